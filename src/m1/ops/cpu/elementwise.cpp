// The steps between a decoder layer's matrix products: residual connection with RMSNorm, and SwiGLU. One thread handles
// each row, and the order of its sums doesn't depend on other rows, so results are batch-invariant.

#include <cmath>

#include "vector.h"

namespace {

using namespace m1;

constexpr int64_t PARALLEL = 1 << 14;  // elements above which a second thread pays off
constexpr int SUMS = N / W;            // independent sums, so that additions don't wait for each other

struct Norm {
  int64_t rows, width, dtype;
  double eps;
  void* hidden;        // [rows, width], updated
  const void* update;  // as hidden, or null
  const void* weight;  // [width]
  void* out;           // as hidden
};

struct Gate {
  int64_t rows, width, dtype;
  const void* gate_up;  // [rows, 2 width]
  void* out;            // [rows, width]
};

template <class T>
void add_rms_norm(const Norm& p) {
  const T* weight = (const T*)p.weight;
#pragma omp parallel for schedule(static) if (p.rows * p.width > PARALLEL)
  for (int64_t row = 0; row < p.rows; ++row) {
    T *hidden = (T*)p.hidden + row * p.width, *out = (T*)p.out + row * p.width;
    if (p.update) {
      const T* update = (const T*)p.update + row * p.width;
      for (int64_t i = 0; i < p.width; i += W) store(hidden + i, load(hidden + i) + load(update + i));
    }
    vec sums[SUMS] = {};
    for (int64_t i = 0; i < p.width; i += N) {
      for (int s = 0; s < SUMS; ++s) {
        const vec x = load(hidden + i + s * W);
        sums[s] += x * x;
      }
    }
    double total = 0;
    for (int s = 0; s < SUMS; ++s)
      for (int lane = 0; lane < W; ++lane) total += sums[s][lane];
    const vec scale = splat((float)(1.0 / std::sqrt(total / p.width + p.eps)));
    for (int64_t i = 0; i < p.width; i += W) store(out + i, load(hidden + i) * scale * load(weight + i));
  }
}

template <class T>
void swiglu(const Gate& p) {
#pragma omp parallel for schedule(static) if (p.rows * p.width > PARALLEL)
  for (int64_t row = 0; row < p.rows; ++row) {
    const T *gate = (const T*)p.gate_up + row * 2 * p.width, *up = gate + p.width;
    T* out = (T*)p.out + row * p.width;
    for (int64_t i = 0; i < p.width; i += W) {
      const vec g = load(gate + i);
      store(out + i, g * sigmoid(g) * load(up + i));
    }
  }
}

}  // namespace

extern "C" int64_t m1_add_rms_norm(const Norm* p) {
  with_type(p->dtype, [&](auto t) { add_rms_norm<decltype(t)>(*p); });
  return -1;
}

extern "C" int64_t m1_swiglu(const Gate* p) {
  with_type(p->dtype, [&](auto t) { swiglu<decltype(t)>(*p); });
  return -1;
}
