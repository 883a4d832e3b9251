// What a decode step knows of each slot's sequence: read before and advanced after the step. The specification is
// read_registers and advance_registers in ops/reference.py.

#include "vector.h"

namespace {

constexpr int TOKEN = 0, LENGTH = 1, DRAWN = 2, ENDED = 3, STREAM = 4, STOPS = 6;  // columns, as in ops/inputs.py
constexpr int TEMPERATURE = 0;

struct Read {
  int64_t rows, slot_count, width, float_width;
  const int64_t* integers;  // [slots, width]
  const float* floats;      // [slots, float_width]
  const int64_t* slots;     // [rows]
  int64_t *tokens, *active, *lengths, *keys;
  double* uniform;
  float* temperature;
};

struct Advance {
  int64_t rows, slot_count, width;
  int64_t* integers;
  const int64_t *slots, *tokens;
};

// Element `index` of a stream of SplitMix64 in [0, 1), as `uniforms` in ops/random_bits.py.
double uniform(uint64_t stream, uint64_t index) {
  uint64_t x = stream + (index + 1) * 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return (double)((x ^ (x >> 31)) >> 11) * 0x1p-53;
}

int64_t bad_row(const int64_t* slots, int64_t rows, int64_t slot_count) {
  for (int64_t i = 0; i < rows; ++i)
    if (slots[i] < 0 || slots[i] >= slot_count) return i;
  return -1;
}

}  // namespace

// Both return -1, or the first row whose slot is out of range, in which case nothing was written.
extern "C" int64_t m1_read_registers(const Read* p) {
  const int64_t bad = bad_row(p->slots, p->rows, p->slot_count);
  for (int64_t i = 0; bad < 0 && i < p->rows; ++i) {
    const int64_t slot = p->slots[i], *own = p->integers + slot * p->width;
    p->tokens[i] = own[TOKEN];
    p->active[i] = own[ENDED] > 0 ? -1 : slot;
    p->lengths[i] = own[LENGTH];
    p->keys[i] = own[LENGTH] + 1;
    p->uniform[i] = uniform(own[STREAM], own[DRAWN]);
    p->temperature[i] = p->floats[slot * p->float_width + TEMPERATURE];
  }
  return bad;
}

extern "C" int64_t m1_advance_registers(const Advance* p) {
  const int64_t bad = bad_row(p->slots, p->rows, p->slot_count);
  for (int64_t i = 0; bad < 0 && i < p->rows; ++i) {
    int64_t *own = p->integers + p->slots[i] * p->width, runs = 1 - own[ENDED];
    own[TOKEN] = p->tokens[i];
    own[LENGTH] += runs;
    own[DRAWN] += runs;
    for (int64_t c = STOPS; c < p->width; ++c)
      if (own[c] == p->tokens[i]) own[ENDED] |= 1;
  }
  return bad;
}
