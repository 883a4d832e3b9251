// A linear layer for few rows, with weights that are packed once. The specification is torch's F.linear.
//
// Weights are packed in panels of WIDTH outputs, input by input, so memory is read once and in order. A tile of rows
// keeps its sums with a panel in registers over DEPTH inputs. That part of the panel stays in the L1 cache for all
// tiles of a block of rows. An output starts with its bias. Then the sums over DEPTH inputs, each accumulated in order
// from zero, are added in order. So the result depends on no other rows, tiles or threads.

#include <algorithm>
#include <vector>

#include "vector.h"

namespace {

using namespace m1;

constexpr int WIDTH = 2 * W;                         // outputs per panel
constexpr int TILE = W == 16 ? 12 : W == 8 ? 6 : 4;  // rows whose sums fit in registers beside the operands
constexpr int DEPTH = 4096 / WIDTH;                  // inputs; 16 KB of float32 per panel
constexpr int BLOCK = 96;                            // maximum number of rows
constexpr int64_t SMALL = 1 << 16;                   // multiplications up to which one thread is faster

constexpr int64_t INT8 = 3;  // a kind of weight beside those of `with_type`

struct Layer {
  int64_t inputs, outputs;
  int64_t kind;
  const void* weight;  // [panels, inputs, WIDTH]; bfloat16 in the order of `widen`
  const float* bias;   // [panels, WIDTH], divided by the scale
  const float* scale;  // [panels, WIDTH], for int8 weights
};

struct Rows {
  int64_t count, stride, dtype;
  const void* x;       // [count, inputs], rows `stride` elements apart
  void* out;           // [count, outputs]
};

template <class T>
inline void widen(const T* p, vec (&v)[2]) {
  for (int i = 0; i < 2; ++i) v[i] = load(p + i * W);
}

// Outputs i and W + i are side by side. This is the fastest to widen: W + i is already in the upper half of 32 bits.
inline void widen(const bf16* p, vec (&v)[2]) {
  uvec pairs;
  std::memcpy(&pairs, p, sizeof pairs);
  v[0] = (vec)(pairs << 16);
  v[1] = (vec)(pairs & 0xffff0000u);
}

inline void widen(const int8_t* p, vec (&v)[2]) {
  for (int i = 0; i < 2; ++i) {
#if defined(__AVX512F__)
    v[i] = (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(p + i * W))));
#elif defined(__AVX2__)
    v[i] = (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + i * W))));
#else
    for (int lane = 0; lane < W; ++lane) v[i][lane] = p[i * W + lane];
#endif
  }
}

// One or a few rows take several panels at once: one panel has too few independent sums to keep the processor busy.
constexpr int panels_for(int64_t rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }
constexpr int most_rows(int panels) { return panels == 4 ? 1 : panels == 2 ? 3 : TILE; }

// The product of a tile of rows with PANELS panels, over `count` inputs.
template <class T>
struct Tile {
  const float* x;                // rows `stride` elements apart
  const T *weight, *ahead;       // ahead: weights to prefetch, `pace` of them per input
  int64_t stride, panel, pace;   // panel: elements from one panel to the next
  int64_t count;                 // inputs
  float* sums;                   // [rows, PANELS, WIDTH], to which the products are added

  template <int ROWS, int PANELS>
  void multiply() const {
    vec total[ROWS][PANELS][2] = {};
    for (int64_t k = 0; k < count; ++k) {
      if constexpr (PANELS == 1) __builtin_prefetch(ahead + k * pace);
      for (int p = 0; p < PANELS; ++p) {
        vec w[2];
        widen(weight + p * panel + k * WIDTH, w);
        for (int r = 0; r < ROWS; ++r)
          for (int i = 0; i < 2; ++i) total[r][p][i] += x[r * stride + k] * w[i];
      }
    }
    for (int r = 0; r < ROWS; ++r)
      for (int p = 0; p < PANELS; ++p)
        for (int i = 0; i < 2; ++i) {
          float* sum = sums + (r * PANELS + p) * WIDTH + i * W;
          store(sum, load(sum) + total[r][p][i]);
        }
  }

  template <int PANELS, int ROWS = most_rows(PANELS)>
  void run(int64_t rows) const {
    if constexpr (ROWS > 1)
      if (rows < ROWS) return run<PANELS, ROWS - 1>(rows);
    multiply<ROWS, PANELS>();
  }
};

template <class O>
void write(const float* sums, O* out, int64_t count) {
  O all[WIDTH];
  O* to = count < WIDTH ? all : out;
  for (int i = 0; i < WIDTH; i += W) store(to + i, load(sums + i));
  if (count < WIDTH) std::memcpy(out, all, count * sizeof(O));
}

// Computes the outputs of `count` <= BLOCK rows from `row` on, and of PANELS panels from `panel` on.
template <class T, int PANELS>
void block(const Layer& p, const Rows& rows, const float* x, int64_t stride, int64_t row, int64_t count,
           int64_t panel) {
  float sums[BLOCK * WIDTH];  // enough for several panels too: they come with few rows
  const int64_t size = p.inputs * WIDTH, tiles = (count + most_rows(PANELS) - 1) / most_rows(PANELS);
  const int64_t pace = (WIDTH + tiles - 1) / tiles;  // together the tiles prefetch all of the next DEPTH inputs
  for (int64_t r = 0; r < count; ++r)
    std::memcpy(sums + r * PANELS * WIDTH, p.bias + panel * WIDTH, PANELS * WIDTH * sizeof(float));
  for (int64_t k = 0; k < p.inputs; k += DEPTH) {
    const int64_t depth = std::min<int64_t>(DEPTH, p.inputs - k);
    const T *weight = (const T*)p.weight + panel * size + k * WIDTH, *next = weight + depth * WIDTH;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t first = t * count / tiles, end = (t + 1) * count / tiles;
      Tile<T>{x + (row + first) * stride + k, weight, next + t * depth * pace, stride, size, pace, depth,
              sums + first * PANELS * WIDTH}.template run<PANELS>(end - first);
    }
  }
  for (int64_t r = 0; r < count; ++r)
    for (int i = 0; i < PANELS; ++i) {
      float* sum = sums + (r * PANELS + i) * WIDTH;
      if (p.kind == INT8)
        for (int c = 0; c < WIDTH; c += W) store(sum + c, load(sum + c) * load(p.scale + (panel + i) * WIDTH + c));
      const int64_t column = (panel + i) * WIDTH, at = (row + r) * p.outputs + column;
      const int64_t some = std::min<int64_t>(WIDTH, p.outputs - column);
      with_type(rows.dtype, [&](auto t) { write(sum, (decltype(t)*)rows.out + at, some); });
    }
}

template <class T>
void to_float(const T* from, float* to, int64_t count) {
  int64_t i = 0;
  for (; i + W <= count; i += W) store(to + i, load(from + i));
  if (i == count) return;
  T rest[W] = {};
  std::memcpy(rest, from + i, (count - i) * sizeof(T));
  const vec v = load(rest);
  std::memcpy(to + i, &v, (count - i) * sizeof(float));
}

template <class T>
void linear(const Layer& p, const Rows& rows) {
  // Reused by later calls: allocating memory would take longer than writing to it.
  static thread_local std::vector<float> kept;
  const bool convert = rows.dtype != 0;
  if (convert) kept.resize(std::max<size_t>(kept.size(), rows.count * p.inputs));
  float* converted = kept.data();
  const float* x = convert ? converted : (const float*)rows.x;
  const int64_t stride = convert ? p.inputs : rows.stride;
  const int64_t blocks = (rows.count + BLOCK - 1) / BLOCK, panels = (p.outputs + WIDTH - 1) / WIDTH;
  const int64_t together = panels_for(rows.count), groups = (panels + together - 1) / together;
#pragma omp parallel if (rows.count * p.inputs * p.outputs > SMALL)
  {
    if (convert) {
#pragma omp for schedule(static)
      for (int64_t r = 0; r < rows.count; ++r)
        with_type(rows.dtype, [&](auto t) {
          to_float((const decltype(t)*)rows.x + r * rows.stride, converted + r * stride, p.inputs);
        });
    }
#pragma omp for collapse(2) schedule(static) nowait
    for (int64_t group = 0; group < groups; ++group)
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t row = b * rows.count / blocks, count = (b + 1) * rows.count / blocks - row;
        const int64_t panel = group * together, end = std::min(panel + together, panels);
        if (together == 4 && end - panel == 4) {
          block<T, 4>(p, rows, x, stride, row, count, panel);
        } else if (together == 2 && end - panel == 2) {
          block<T, 2>(p, rows, x, stride, row, count, panel);
        } else {
          for (int64_t i = panel; i < end; ++i) block<T, 1>(p, rows, x, stride, row, count, i);
        }
      }
  }
}

}  // namespace

// Outputs per panel.
extern "C" int64_t m1_linear_width() { return WIDTH; }

extern "C" void m1_linear(const Layer* p, const Rows* rows) {
  if (p->kind == INT8) return linear<int8_t>(*p, *rows);
  with_type(p->kind, [&](auto t) { linear<decltype(t)>(*p, *rows); });
}
