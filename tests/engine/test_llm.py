"""Text around the engine: stop strings that tokens split, streams, files that go on where they were cut off."""

import json
from dataclasses import replace

import pytest
import torch
from commands import m1
from gguf_files import gguf_teacher, write_gguf
from typer.testing import CliRunner

from m1.cli import app
from m1.data_options import Data
from m1.engine import Request, SamplingParams, fold_in
from m1.engine.generate import generate_file
from m1.engine.llm import LLM, TextSequence
from m1.errors import UserError
from m1.jsonl import read_jsonl
from m1.model.gguf import import_gguf
from m1.ops.quantize import quantize as quantized
from m1.train.data import conversations

PARAMS = SamplingParams(max_tokens=24, temperature=1.0, seed=1, ignore_eos=True)
CHAT = [{"role": "user", "content": "2+2?"}]


@pytest.fixture
def llm(hybrid_dir):
    return LLM.from_pretrained(hybrid_dir, max_model_len=200)


def test_streamed_text_grows_into_the_whole(llm):
    seen = {}
    for sample in llm.stream(["ab", CHAT], replace(PARAMS, n=2)):
        key = sample.prompt, sample.sequence.index
        assert sample.text.startswith(seen.get(key, ""))
        seen[key] = sample.text
    whole = llm.generate(["ab", CHAT], replace(PARAMS, n=2))
    assert [(s.prompt, s.sequence.index) for s in whole] == [(0, 0), (0, 1), (1, 0), (1, 1)] and len(seen) == 4
    for sample in whole:
        assert sample.sequence.done and seen[sample.prompt, sample.sequence.index] == sample.text
        assert sample.text == llm.tokenizer.decode(sample.sequence.token_ids, skip_special_tokens=True)


def test_nothing_that_was_streamed_is_taken_back(llm):
    """A stop string's beginning is held back until it is clear that it is none."""
    text = llm.generate(["ab"], PARAMS)[0].text
    for stop in [(text[8:11],), (text[8:10] + "never there",), (text[-2:] + "never there",), (text[8:11], text[7:10])]:
        shown, params = "", replace(PARAMS, stop=stop)
        for sample in llm.stream(["ab"], params):
            assert sample.text.startswith(shown)
            assert sample.sequence.done or not any(sample.text.endswith(s[:n]) for s in stop for n in range(1, len(s)))
            shown = sample.text
        assert shown == text[: min((text.find(s) for s in stop if s in text), default=len(text))]


def test_a_stop_string_ended_by_the_last_token_is_a_stop(llm):
    free = llm.generate(["ab"], PARAMS)[0]
    for count in range(1, PARAMS.max_tokens + 1):
        cut = llm.generate(["ab"], replace(PARAMS, max_tokens=count))[0]
        if len(cut.text) > 3 and cut.text[-3:] not in free.text[: len(cut.text) - 1]:
            break
    stopped = llm.generate(["ab"], replace(PARAMS, max_tokens=count, stop=(cut.text[-3:],)))[0]
    assert stopped.text == cut.text[:-3] and stopped.sequence.finish_reason == "stop"
    assert cut.sequence.finish_reason == "length"
    assert llm.engine.free_slots == llm.engine.num_slots


def test_special_tokens_are_left_out_alike(llm):
    """`m1 generate` reads a `TextSequence`; eval and solve use `decode`."""
    for sample in llm.generate(["ab", CHAT], replace(PARAMS, n=4, max_tokens=80, ignore_eos=False)):
        assert sample.text == llm.decode(sample.sequence.token_ids)
    end, special, plain = llm.stop_token_ids[0], llm.tokenizer.convert_tokens_to_ids("<|user|>"), 65
    assert llm.decode([plain, special, plain, end]) == llm.tokenizer.decode([plain, plain])
    assert LLM(llm.model, llm.tokenizer, [plain]).decode([special, 66, plain]) == llm.tokenizer.decode([66])


def test_a_stop_string_over_several_tokens_ends_its_sample_alone(llm):
    free = llm.generate(["ab", "cd"], PARAMS)
    text = free[0].text
    stop = text[5:8]  # one byte a token: the string is split over three
    assert len(stop) == 3 and stop not in free[1].text
    stopped = llm.generate(["ab", "cd"], replace(PARAMS, stop=(stop, "never there")))
    assert stopped[0].text == text[: text.find(stop)] and stopped[0].sequence.finish_reason == "stop"
    assert len(stopped[0].sequence.token_ids) < PARAMS.max_tokens
    assert stopped[1].text == free[1].text and stopped[1].sequence.finish_reason == "length"
    assert llm.engine.free_slots == llm.engine.num_slots


def test_a_length_of_0_is_refused_as_the_engine_refuses_it(hybrid_dir):
    with pytest.raises(UserError, match="max_model_len=0: must be at least 1"):
        LLM.from_pretrained(hybrid_dir, max_model_len=0).generate(["ab"], PARAMS)


def test_of_stop_strings_that_end_together_the_earliest_cuts(llm):
    text = llm.generate(["ab"], PARAMS)[0].text
    stopped = llm.generate(["ab"], replace(PARAMS, stop=(text[6:8], text[5:8])))[0]
    assert stopped.text == text[: text.find(text[5:8])]


def test_equal_prompts_have_seeds_of_their_own(llm):
    first, second = llm.generate(["ab", "ab"], PARAMS)
    assert first.text != second.text and llm.generate(["ab"], PARAMS)[0].text == first.text


def test_an_abandoned_stream_frees_its_slots(llm):
    stream = llm.stream(["ab"], replace(PARAMS, n=3))
    next(stream)
    stream.close()
    assert llm.engine.free_slots == llm.engine.num_slots and not llm.engine.busy


def test_the_engine_is_as_long_as_what_is_asked_and_stays_while_it_has_room(hybrid_dir):
    llm = LLM.from_pretrained(hybrid_dir)
    first = llm.engine_for([[1] * 10, [1] * 30], 20)
    assert first.max_model_len == 50 and llm.engine_for([[1] * 40], 10) is first
    assert llm.engine_for([[1] * 40], 11).max_model_len == 51
    assert llm.engine_for([[1] * 40], 10_000).max_model_len == 512  # the model's context
    assert set(llm.stop_token_ids) == llm.engine.scheduler.stop_token_ids == {llm.tokenizer.eos_token_id}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_file_goes_on_where_it_was_cut_off(hybrid_dir, tmp_path):
    prompts, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write(prompts, [{"prompt": "ab"}, {"problem": "1+1?", "id": "sum"}, {"messages": CHAT, "id": 7}])
    llm, params = LLM.from_pretrained(hybrid_dir), replace(PARAMS, n=2)

    class Cut(Exception):
        pass

    def cut(done, total):
        if done == 3:
            raise Cut

    with pytest.raises(Cut):
        generate_file(llm, prompts, out, params, on_progress=cut)
    kept = out.read_text()
    assert len(kept.splitlines()) == 3
    out.write_text(kept + '{"id": "torn')
    assert generate_file(llm, prompts, out, params).tokens == 3 * 24  # the missing samples and no others
    generate_file(llm, prompts, tmp_path / "whole.jsonl", params)
    rows, whole = (list(read_jsonl(path)) for path in (out, tmp_path / "whole.jsonl"))
    assert {(r["id"], r["sample"]): r["text"] for r in rows} == {(r["id"], r["sample"]): r["text"] for r in whole}
    assert len({r["text"] for r in whole}) == 6
    assert out.read_text().startswith(kept)
    assert sorted((r["id"], r["sample"]) for r in rows) == [(i, j) for i in ("0", "7", "sum") for j in (0, 1)]
    assert all(r["tokens"] == 24 and r["finish_reason"] == "length" and r["logprob"] < 0 for r in rows)
    for row in rows:  # a training stage reads it as it is
        (conversation,) = conversations(Data(path=str(out)), "", [row])
        asked = {"0": "ab", "sum": "1+1?", "7": "2+2?"}[row["id"]]
        assert [message["content"] for message in conversation.messages] == [asked, row["text"]]
    assert generate_file(llm, prompts, out, params)[0] == 0


def test_some_prompts_of_a_file_have_the_samples_they_have_among_all(hybrid_dir, tmp_path):
    prompts, llm = tmp_path / "in.jsonl", LLM.from_pretrained(hybrid_dir)
    write(prompts, [{"prompt": text} for text in ("ab", "cd", "ef", "gh")])
    found = {}
    for name, chosen in (("all", (0, None)), ("some", (1, 2))):
        generate_file(llm, prompts, tmp_path / name, PARAMS, chosen=chosen)
        found[name] = {row["id"]: row["text"] for row in read_jsonl(tmp_path / name)}
    assert found["some"] == {i: found["all"][i] for i in ("1", "2")}
    options = ["--model", hybrid_dir, "--prompts", prompts, "--out", tmp_path / "none", "--skip", 4]
    assert m1("generate", *options) == 2 and not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [([{"text": "x"}], "row 1: needs"), ([{"prompt": "a", "id": 1}, {"prompt": "b", "id": 1}], "not unique")],
)
def test_bad_files_are_refused(hybrid_dir, tmp_path, rows, message):
    write(tmp_path / "in.jsonl", rows)
    with pytest.raises(UserError, match=message):
        generate_file(LLM.from_pretrained(hybrid_dir), tmp_path / "in.jsonl", tmp_path / "out.jsonl", PARAMS)


def test_command(hybrid_dir, tmp_path):
    prompts, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write(prompts, [{"prompt": "ab"}])
    options = ["--model", hybrid_dir, "--prompts", prompts, "--out", out, "--n", "2", "--max-new-tokens", "5"]
    result = CliRunner().invoke(app, ["generate", *map(str, options)])
    assert result.exit_code == 0, result.output
    assert "tokens/s" in result.output and len(list(read_jsonl(out))) == 2


def test_the_prompt_template_is_for_problems(hybrid_dir, tmp_path):
    rows = [{"problem": "2+2?"}, {"prompt": "2+2?"}, {"messages": CHAT}]
    write(tmp_path / "plain.jsonl", rows)
    write(tmp_path / "written.jsonl", [{"problem": "Q: 2+2?"}, *rows[1:]])
    (tmp_path / "template").write_text("Q: {problem}")
    texts = {}
    for name, template in (("plain", f"@{tmp_path / 'template'}"), ("written", "{problem}")):
        options = ["--prompts", tmp_path / f"{name}.jsonl", "--out", tmp_path / f"{name}.out", "--max-new-tokens", 5]
        assert m1("generate", "--model", hybrid_dir, *options, "--prompt-template", template) == 0
        texts[name] = [row["text"] for row in read_jsonl(tmp_path / f"{name}.out")]
    assert texts["plain"] == texts["written"]


def test_a_system_prompt_and_examples_are_for_problems(hybrid_dir, tmp_path):
    (tmp_path / "shots.jsonl").write_text('{"problem": "1+1", "answer": 2}')
    chat = [{"role": r, "content": c} for r, c in (("system", "Hi"), ("user", "1+1"), ("assistant", "2"))]
    write(tmp_path / "short.jsonl", [{"problem": "2+2?"}, {"prompt": "ab"}])
    write(tmp_path / "written.jsonl", [{"messages": chat + CHAT}, {"prompt": "ab"}])
    options = {"short": ["--system-prompt", "Hi", "--few-shot", tmp_path / "shots.jsonl"], "written": []}
    for name, own in options.items():
        files = ["--prompts", tmp_path / f"{name}.jsonl", "--out", tmp_path / f"{name}.out"]
        assert m1("generate", "--model", hybrid_dir, *files, "--max-new-tokens", 5, *own) == 0
    texts = [[row["text"] for row in read_jsonl(tmp_path / f"{name}.out")] for name in options]
    assert texts[0] == texts[1]


def test_indices_choose_samples_of_a_prompt(llm):
    """Whichever are asked for, in any order: each is the one that it would be among all."""
    whole = [s.sequence.token_ids for s in llm.generate(["ab"], replace(PARAMS, n=6))]
    request = Request(llm.encode("ab"), replace(PARAMS, seed=fold_in(PARAMS.seed, 0)), indices=(4, 1))
    some = {s.sequence.index: s.sequence.token_ids for s in llm.stream_requests([request]) if s.sequence.done}
    assert request.params.n == 2 and some == {4: whole[4], 1: whole[1]}


def test_only_running_samples_are_read(hybrid_dir, monkeypatch):
    """Those that wait for a slot cost a step nothing, however many they are."""
    llm, reads, read = LLM.from_pretrained(hybrid_dir, max_num_seqs=2), [], TextSequence.read
    monkeypatch.setattr(TextSequence, "read", lambda sample: reads.append(sample) or read(sample))
    samples = llm.generate(["ab"], replace(PARAMS, n=20, max_tokens=4))
    assert len(samples) == 20 and len(reads) <= 20 * 4


def test_a_context_that_ends_early_is_said_once(hybrid_dir, tmp_path, capsys):
    """It is 512 tokens. Two prompts with two samples each ask for more."""
    prompts, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write(prompts, [{"prompt": "a" * 500}, {"prompt": "b" * 505}])
    options = ["--model", hybrid_dir, "--prompts", prompts, "--out", out, "--n", 2, "--max-new-tokens", 8192]
    assert m1("generate", *options) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("m1: ")]
    assert lines == ["m1: max_tokens is 8192, more than the model's context of 512 tokens leaves: samples end there"]
    cut = {(row["id"], row["tokens"]) for row in read_jsonl(out) if row["finish_reason"] == "length"}
    assert cut and cut <= {("0", 12), ("1", 7)}


def test_a_special_token_stops_as_a_string(llm):
    """Texts don't have it, so it is taken for its token."""
    special = {llm.tokenizer.convert_tokens_to_ids(text): text for text in ("<|user|>", "<|system|>", "<|assistant|>")}
    params = replace(PARAMS, n=8, max_tokens=100)
    free = llm.generate(["ab"], params)
    places = [next((i for i, t in enumerate(s.sequence.token_ids) if t in special), None) for s in free]
    assert any(places)
    stopped = llm.generate(["ab"], replace(params, stop=tuple(special.values())))
    for before, after, place in zip(free, stopped, places, strict=True):
        if place is not None:
            assert after.sequence.token_ids == before.sequence.token_ids[: place + 1]
            assert after.sequence.finish_reason == "stop" and before.text.startswith(after.text)


@pytest.mark.parametrize(("kind", "quantize"), [("Q8_0", "int8"), ("Q4_1", "int4"), ("F16", None)])
def test_a_gguf_files_weights_run_as_they_are(tmp_path, kind, quantize):
    file = write_gguf(tmp_path / "tiny.gguf", gguf_teacher(hidden_size=64, intermediate_size=96), kind=kind)
    llm = LLM.from_pretrained(file, max_model_len=64)
    assert llm.engine_options["quantize"] == quantize and llm.model.dtype == torch.float32
    for name, parameter in llm.model.named_parameters():
        if quantize and parameter.dim() == 2:
            assert torch.equal(quantized(parameter, quantize).values(), parameter), name
    (sample,) = llm.generate(["12"], SamplingParams(max_tokens=8, temperature=0))
    import_gguf(file, tmp_path / "folder", "float32")
    (plain,) = LLM.from_pretrained(tmp_path / "folder", max_model_len=64).generate(
        ["12"], SamplingParams(max_tokens=8, temperature=0)
    )
    assert abs(sample.sequence.logprobs[0] - plain.sequence.logprobs[0]) < 0.05
    assert LLM.from_pretrained(file, "float32").engine_options.get("quantize") is None
    asked = LLM.from_pretrained(file, "bfloat16", quantize="int4")
    assert asked.engine_options["quantize"] == "int4" and asked.model.dtype == torch.bfloat16
