// A linear layer for inference, with weights that are packed once. The specification is torch's F.linear, for quantized
// weights `quantized_linear` in ops/reference.py.
//
// A tile of rows keeps its sums with a panel (tile.h) in registers over DEPTH steps. That part of the panel stays in the
// L1 cache for all tiles of a block of rows. An output starts with its bias. Then the sums over DEPTH steps (over GROUP
// inputs for quantized weights), each accumulated in order from zero, are added in order. So the result depends on no
// other rows, tiles or threads.
//
// Where the processor multiplies bfloat16, bfloat16 rows are taken as they are. Where it multiplies bytes, rows for
// quantized weights are rounded to bytes, with one scale per GROUP inputs.

#include <vector>

#include "tile.h"

namespace {

using namespace m1;

constexpr int DEPTH = 4096 / WIDTH;  // steps; 16 KB per panel
constexpr int BLOCK = 96;            // maximum number of rows
constexpr int64_t SMALL = 1 << 16;   // multiplications up to which one thread is faster

struct Linear {
  int64_t inputs, outputs, kind, gated;  // outputs: of a row. Gated ones are silu(gate) * up of a panel's two halves
  const uint32_t* weight;             // [panels, steps, WIDTH]; zero where there are no inputs
  const float* bias;                  // [panels, WIDTH]
  const f16 *scales, *minima;         // [panels, groups, WIDTH], for quantized weights; minima for Q4
  int64_t rows, stride, dtype;
  const void* x;                      // [rows, inputs], rows `stride` elements apart
  void* out;                          // [rows, outputs]
};

// One or a few rows take several panels at once: one panel has too few independent sums to keep the processor busy.
constexpr int panels_for(int64_t rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }

// Rows as the kernel takes them.
template <class X>
struct Rows {
  const X* x;                 // [rows, ...], `stride` elements apart
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
                    p.scales + at, kind == Q4 ? p.minima + at : nullptr, rows.stride, rows.groups, depth,
                    steps * WIDTH, rows.groups * WIDTH, pace, sums + first * PANELS * WIDTH}.template run<PANELS>(end - first);
    }
  }
  for (int64_t r = 0; r < count; ++r)
    for (int i = 0; i < PANELS; ++i) {
      const int64_t width = p.gated ? W : WIDTH, column = (panel + i) * width;
      float* sum = sums + (r * PANELS + i) * WIDTH;
      if (p.gated) store(sum, load(sum) * sigmoid(load(sum)) * load(sum + W));
      with_type(p.dtype, [&](auto t) {
        from_float(sum, (decltype(t)*)p.out + (row + r) * p.outputs + column, std::min(width, p.outputs - column));
      });
    }
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

// GROUP inputs rounded to -127..127; to 0 if all are so small that 127 divided by them is infinite. One that isn't finite
// makes the scale NaN.
RowGroup take(const float* from, int8_t* to) {
  vec highest = {}, zero = {};
  for (int i = 0; i < GROUP; i += W) {
    highest = max(highest, abs(load(from + i)));
    zero += 0.0f * load(from + i);
  }
  float most = 0;
  for (int lane = 0; lane < W; ++lane) most = std::max(most, highest[lane]);
  const float scale = most / 127.0f, inverse = most > 1e-36f ? 127.0f / most : 0.0f;
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
  const int64_t blocks = (p.rows + BLOCK - 1) / BLOCK, width = p.gated ? W : WIDTH;
  const int64_t panels = (p.outputs + width - 1) / width;
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
extern "C" int64_t m1_linear_rounds_rows(const void*) { return std::is_same_v<Bytes, int8_t>; }

extern "C" int64_t m1_linear(const Linear* p) {
  switch (p->kind) {
    case F32: linear<F32, float>(*p); break;
    case F16: linear<F16, float>(*p); break;
    case BF16: p->dtype == BF16 ? linear<BF16, Halves>(*p) : linear<BF16, float>(*p); break;
    case Q8: linear<Q8, Bytes>(*p); break;
    case Q4: linear<Q4, Bytes>(*p); break;
  }
  return -1;
}
