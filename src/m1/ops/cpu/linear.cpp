// A linear layer for inference, with weights that are packed once. The specification is torch's F.linear, for quantized
// weights `quantized_linear` in ops/reference.py.
//
// Weights are packed in panels of WIDTH outputs. A word of 32 bits has one or several inputs of an output, and a step
// is the WIDTH words of the same inputs, so memory is read once and in order. A tile of rows keeps its sums with a panel
// in registers over DEPTH steps. That part of the panel stays in the L1 cache for all tiles of a block of rows. An
// output starts with its bias. Then the sums over DEPTH steps (over GROUP inputs for quantized weights), each
// accumulated in order from zero, are added in order. So the result depends on no other rows, tiles or threads.
//
// Where the processor multiplies bfloat16 or bytes, rows are in that type, too: bfloat16 rows as they are, and rows for
// quantized weights rounded to bytes, with one scale per GROUP inputs. Elsewhere rows are float32.

#include <algorithm>
#include <type_traits>
#include <vector>

#include "vector.h"

namespace {

using namespace m1;

constexpr int WIDTH = 2 * W;                         // outputs per panel
constexpr int TILE = W == 16 ? 12 : W == 8 ? 6 : 4;  // rows whose sums fit in registers beside the operands
constexpr int DEPTH = 4096 / WIDTH;                  // steps; 16 KB per panel
constexpr int BLOCK = 96;                            // maximum number of rows
constexpr int GROUP = 32;                            // inputs of a quantized weight that share a scale
constexpr int64_t SMALL = 1 << 16;                   // multiplications up to which one thread is faster

enum Kind : int64_t { F32, BF16, F16, Q8, Q4 };      // of weights; the first three as in `with_type`

constexpr int inputs_per_word(Kind kind) { return kind == F32 ? 1 : kind == Q8 ? 4 : kind == Q4 ? 8 : 2; }
constexpr bool quantized(Kind kind) { return kind == Q8 || kind == Q4; }

struct Linear {
  int64_t inputs, outputs, kind;
  const uint32_t* weight;             // [panels, steps, WIDTH]; zero where there are no inputs
  const float* bias;                  // [panels, WIDTH]
  const f16 *scales, *minima;         // [panels, groups, WIDTH], for quantized weights; minima for Q4
  int64_t rows, stride, dtype;
  const void* x;                      // [rows, inputs], rows `stride` elements apart
  void* out;                          // [rows, outputs]
};

// A row for quantized weights has one of these per GROUP inputs.
struct RowGroup {
  float scale, sum;  // sum: of the rounded inputs
};

// Which kinds meet rows of their own type.
#if defined(__AVX512BF16__)
constexpr bool MULTIPLIES_BF16 = true;
#else
constexpr bool MULTIPLIES_BF16 = false;
#endif
#if defined(__AVX512VNNI__) || (defined(__AVXVNNI__) && !defined(__AVX512F__))
constexpr bool MULTIPLIES_BYTES = true;
#else
constexpr bool MULTIPLIES_BYTES = false;
#endif

// The sum of products of W outputs with a row, for a kind of weight, `add`ed word by word.
template <Kind kind, class X>
struct Sum;

// Rows in float32. Input i of a word is widened to float.
template <Kind kind>
struct Sum<kind, float> {
  vec total = {};

  static vec widen(uvec word, int i) {
    if constexpr (kind == F32) return (vec)word;
    if constexpr (kind == BF16) return (vec)(i ? word & 0xffff0000u : word << 16);
    if constexpr (kind == F16) return m1::widen(__builtin_convertvector(word >> 16 * i, halves));
    if constexpr (kind == Q8) return __builtin_convertvector((ivec)(word >> 8 * i & 0xffu), vec);
    if constexpr (kind == Q4) return __builtin_convertvector((ivec)(word >> (8 * (i % 4) + i / 4 * 4) & 0xfu), vec);
  }

  void add(uvec word, const float* x) {
    for (int i = 0; i < inputs_per_word(kind); ++i) total += x[kind == Q4 ? i % 4 + i / 4 * (GROUP / 2) : i] * widen(word, i);
  }

  vec value() const { return total; }
};

inline uvec load_words(const uint32_t* p) {
  uvec words;
  std::memcpy(&words, p, sizeof words);
  return words;
}

inline uint32_t word_at(const void* p) {
  uint32_t word;
  std::memcpy(&word, p, sizeof word);
  return word;
}

#if defined(__AVX512BF16__)
template <>
struct Sum<BF16, bf16> {
  vec total = {};

  void add(uvec word, const bf16* x) {
    total = (vec)_mm512_dpbf16_ps((__m512)total, (__m512bh)word, (__m512bh)(uvec{} + word_at(x)));
  }

  vec value() const { return total; }
};
#endif

// Adds the products of 4 unsigned bytes of each word with 4 signed bytes.
inline ivec multiply_bytes(ivec total, uvec word, uint32_t x) {
#if defined(__AVX512VNNI__)
  return (ivec)_mm512_dpbusd_epi32((__m512i)total, (__m512i)word, (__m512i)(uvec{} + x));
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
  return (ivec)_mm256_dpbusd_avx_epi32((__m256i)total, (__m256i)word, (__m256i)(uvec{} + x));
#else
  return total;
#endif
}

template <>
struct Sum<Q8, int8_t> {
  ivec total = {};

  void add(uvec word, const int8_t* x) { total = multiply_bytes(total, word, word_at(x)); }
  vec value() const { return __builtin_convertvector(total, vec); }
};

template <>
struct Sum<Q4, int8_t> {
  ivec total = {};

  void add(uvec word, const int8_t* x) {
    total = multiply_bytes(total, word & 0x0f0f0f0fu, word_at(x));
    total = multiply_bytes(total, word >> 4 & 0x0f0f0f0fu, word_at(x + GROUP / 2));
  }
  vec value() const { return __builtin_convertvector(total, vec); }
};

// One or a few rows take several panels at once: one panel has too few independent sums to keep the processor busy.
constexpr int panels_for(int64_t rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }
constexpr int most_rows(Kind kind, int panels) {
  return panels == 4 ? 1 : panels == 2 ? 3 : quantized(kind) ? std::min(TILE, 6) : TILE;  // sums of groups need registers
}

// The product of a tile of rows with PANELS panels, over `steps` steps.
template <Kind kind, class X>
struct Tile {
  const X* x;                     // rows `stride` elements apart
  const RowGroup* row_groups;     // of each row, `groups` apart
  const uint32_t *weight, *ahead; // ahead: weights to prefetch, `pace` words per step
  const f16 *scales, *minima;     // of this part of the panel
  int64_t stride, groups, steps, panel, panel_scales, pace;  // panel: words from one panel to the next
  float* sums;                    // [rows, PANELS, WIDTH], to which the products are added

  template <int ROWS, int PANELS>
  void multiply() const {
    constexpr int PER_WORD = inputs_per_word(kind), RUN = GROUP / PER_WORD;
    Sum<kind, X> sum[ROWS][PANELS][2];
    const auto step = [&](int64_t s) {
      // the words of Q4 have inputs from both halves of their group
      const int64_t input = kind == Q4 ? s / RUN * GROUP + s % RUN * 4 : s * PER_WORD;
      if constexpr (PANELS == 1) __builtin_prefetch(ahead + s * pace);
      for (int p = 0; p < PANELS; ++p) {
        const uint32_t* words = weight + p * panel + s * WIDTH;
        const uvec first = load_words(words), second = load_words(words + W);
        for (int r = 0; r < ROWS; ++r) {
          sum[r][p][0].add(first, x + r * stride + input);
          sum[r][p][1].add(second, x + r * stride + input);
        }
      }
    };
    vec total[ROWS][PANELS][2] = {};
    if constexpr (quantized(kind)) {
      for (int64_t group = 0; group < steps / RUN; ++group) {
        for (int r = 0; r < ROWS; ++r)
          for (int p = 0; p < PANELS; ++p)
            for (int i = 0; i < 2; ++i) sum[r][p][i] = {};
        for (int64_t s = 0; s < RUN; ++s) step(group * RUN + s);
        for (int p = 0; p < PANELS; ++p)
          for (int i = 0; i < 2; ++i) {
            const int64_t at = p * panel_scales + group * WIDTH + i * W;
            const vec scale = load(scales + at), minimum = kind == Q4 ? load(minima + at) : -128.0f * scale;
            for (int r = 0; r < ROWS; ++r) {
              const RowGroup& of_row = row_groups[r * groups + group];
              total[r][p][i] += of_row.scale * scale * sum[r][p][i].value() + of_row.sum * minimum;
            }
          }
      }
    } else {
      for (int64_t s = 0; s < steps; ++s) step(s);
      for (int r = 0; r < ROWS; ++r)
        for (int p = 0; p < PANELS; ++p)
          for (int i = 0; i < 2; ++i) total[r][p][i] = sum[r][p][i].total;
    }
    for (int r = 0; r < ROWS; ++r)
      for (int p = 0; p < PANELS; ++p)
        for (int i = 0; i < 2; ++i) {
          float* to = sums + (r * PANELS + p) * WIDTH + i * W;
          store(to, load(to) + total[r][p][i]);
        }
  }

  template <int PANELS, int ROWS = most_rows(kind, PANELS)>
  void run(int64_t rows) const {
    if constexpr (ROWS > 1)
      if (rows < ROWS) return run<PANELS, ROWS - 1>(rows);
    multiply<ROWS, PANELS>();
  }
};

// Rows as the kernel takes them.
template <class X>
struct Rows {
  const X* x;              // [rows, ...], `stride` elements apart
  int64_t stride, groups;
  const RowGroup* of_groups;  // [rows, groups]
};

// Computes the outputs of `count` <= BLOCK rows from `row` on, and of PANELS panels from `panel` on.
template <Kind kind, int PANELS, class X>
void block(const Linear& p, const Rows<X>& rows, int64_t row, int64_t count, int64_t panel) {
  constexpr int PER_WORD = inputs_per_word(kind);
  float sums[BLOCK * WIDTH];  // enough for several panels too: they come with few rows
  const int64_t steps = quantized(kind) ? rows.groups * GROUP / PER_WORD : (p.inputs + PER_WORD - 1) / PER_WORD;
  const int64_t tiles = (count + most_rows(kind, PANELS) - 1) / most_rows(kind, PANELS);
  const int64_t pace = (WIDTH + tiles - 1) / tiles;  // together the tiles prefetch all of the next DEPTH steps
  for (int64_t r = 0; r < count; ++r)
    std::memcpy(sums + r * PANELS * WIDTH, p.bias + panel * WIDTH, PANELS * WIDTH * sizeof(float));
  for (int64_t s = 0; s < steps; s += DEPTH) {
    const int64_t depth = std::min<int64_t>(DEPTH, steps - s), group = quantized(kind) ? s * PER_WORD / GROUP : 0;
    const uint32_t *weight = p.weight + (panel * steps + s) * WIDTH, *next = weight + depth * WIDTH;
    const int64_t at = (panel * rows.groups + group) * WIDTH;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t first = t * count / tiles, end = (t + 1) * count / tiles;
      Tile<kind, X>{rows.x + (row + first) * rows.stride + s * PER_WORD,
                    rows.of_groups + (row + first) * rows.groups + group, weight, next + t * depth * pace,
                    p.scales + at, kind == Q4 ? p.minima + at : nullptr, rows.stride, rows.groups, depth, steps * WIDTH, rows.groups * WIDTH,
                    pace, sums + first * PANELS * WIDTH}.template run<PANELS>(end - first);
    }
  }
  for (int64_t r = 0; r < count; ++r)
    for (int i = 0; i < PANELS; ++i) {
      const int64_t column = (panel + i) * WIDTH, at = (row + r) * p.outputs + column;
      const int64_t some = std::min<int64_t>(WIDTH, p.outputs - column);
      with_type(p.dtype, [&](auto t) { from_float(sums + (r * PANELS + i) * WIDTH, (decltype(t)*)p.out + at, some); });
    }
}

inline float sum(vec v) {
  float total = 0;
  for (int lane = 0; lane < W; ++lane) total += v[lane];
  return total;
}

// GROUP inputs as they are.
RowGroup take(const float* from, float* to) {
  vec total = {};
  for (int i = 0; i < GROUP; i += W) {
    store(to + i, load(from + i));
    total += load(from + i);
  }
  return {1.0f, sum(total)};
}

// GROUP inputs rounded to -127..127. One that isn't finite makes the scale NaN.
RowGroup take(const float* from, int8_t* to) {
  vec highest = {}, zero = {};
  for (int i = 0; i < GROUP; i += W) {
    highest = max(highest, abs(load(from + i)));
    zero += 0.0f * load(from + i);
  }
  float most = 0;
  for (int lane = 0; lane < W; ++lane) most = std::max(most, highest[lane]);
  const float scale = most / 127.0f, inverse = most > 0 ? 127.0f / most : 0.0f;
  const vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  vec total = {};
  for (int i = 0; i < GROUP; i += W) {
    const vec rounded = load(from + i) * inverse + magic;
    total += rounded - magic;
    typedef int8_t bytes __attribute__((vector_size(W)));
    const bytes b = __builtin_convertvector((ivec)rounded - (ivec)magic, bytes);
    std::memcpy(to + i, &b, sizeof b);
  }
  return {scale + sum(zero), scale * sum(total)};
}

template <Kind kind, class X>
void linear(const Linear& p) {
  constexpr bool same = std::is_same_v<X, float> || std::is_same_v<X, bf16>;
  constexpr int64_t UNIT = quantized(kind) ? GROUP : inputs_per_word(kind);
  const int64_t inputs = (p.inputs + UNIT - 1) / UNIT * UNIT, groups = quantized(kind) ? inputs / GROUP : 0;
  const bool copy = quantized(kind) || inputs != p.inputs || p.dtype != (std::is_same_v<X, float> ? F32 : BF16);
  // Reused by later calls: allocating memory would take longer than writing to it.
  static thread_local std::vector<X> kept;
  static thread_local std::vector<RowGroup> kept_groups;
  if (copy) kept.resize(std::max<size_t>(kept.size(), p.rows * inputs));
  kept_groups.resize(std::max<size_t>(kept_groups.size(), p.rows * groups));
  X* copied = kept.data();
  RowGroup* of_groups = kept_groups.data();
  const Rows<X> rows{copy ? copied : (const X*)p.x, copy ? inputs : p.stride, groups, of_groups};
  const int64_t blocks = (p.rows + BLOCK - 1) / BLOCK, panels = (p.outputs + WIDTH - 1) / WIDTH;
  const int64_t together = panels_for(p.rows), parts = (panels + together - 1) / together;
#pragma omp parallel if (p.rows * p.inputs * p.outputs > SMALL)
  {
    if (copy) {
#pragma omp for schedule(static)
      for (int64_t r = 0; r < p.rows; ++r) {
        X* to = copied + r * inputs;
        with_type(p.dtype, [&](auto t) {
          const auto* from = (const decltype(t)*)p.x + r * p.stride;
          if constexpr (quantized(kind)) {
            for (int64_t g = 0; g < groups; ++g) {
              float some[GROUP] = {};
              to_float(from + g * GROUP, some, std::min<int64_t>(GROUP, p.inputs - g * GROUP));
              of_groups[r * groups + g] = take(some, to + g * GROUP);
            }
          } else if constexpr (std::is_same_v<X, float>) {
            to_float(from, to, p.inputs);
          } else {
            std::memcpy(to, from, p.inputs * sizeof(X));  // of the same type
          }
        });
        if (!quantized(kind) && inputs > p.inputs) to[p.inputs] = X{};
      }
    }
#pragma omp for collapse(2) schedule(static) nowait
    for (int64_t b = 0; b < blocks; ++b)
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t row = b * p.rows / blocks, count = (b + 1) * p.rows / blocks - row;
        const int64_t panel = part * together, end = std::min(panel + together, panels);
        if (together == 4 && end - panel == 4) {
          block<kind, 4>(p, rows, row, count, panel);
        } else if (together == 2 && end - panel == 2) {
          block<kind, 2>(p, rows, row, count, panel);
        } else {
          for (int64_t i = panel; i < end; ++i) block<kind, 1>(p, rows, row, count, i);
        }
      }
  }
}

}  // namespace

// Outputs per panel, and whether rows for quantized weights are rounded to bytes.
extern "C" int64_t m1_linear_width(const void*) { return WIDTH; }
extern "C" int64_t m1_linear_rounds_rows(const void*) { return MULTIPLIES_BYTES; }

extern "C" int64_t m1_linear(const Linear* p) {
  using Bytes = std::conditional_t<MULTIPLIES_BYTES, int8_t, float>;
  using Halves = std::conditional_t<MULTIPLIES_BF16, bf16, float>;
  switch (p->kind) {
    case F32: linear<F32, float>(*p); break;
    case F16: linear<F16, float>(*p); break;
    case BF16: p->dtype == BF16 ? linear<BF16, Halves>(*p) : linear<BF16, float>(*p); break;
    case Q8: linear<Q8, Bytes>(*p); break;
    case Q4: linear<Q4, Bytes>(*p); break;
  }
  return -1;
}
