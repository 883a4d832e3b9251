// One decode step of Mamba-1 and Mamba-2 layers for many sequences. Their states are in slots and are updated in place.
// The specification is state_update and ssd_update in ops/reference.py.
//
// The states of one channel are contiguous, and are read, updated and written once. So lanes are states here, not
// channels, and sum_lanes turns the products of W channels with C into W outputs. A unit of work is one row and one
// key-value group, with all channels that read this group. It alone reads the group's conv_state, so it can shift it.

#include <vector>

#include "vector.h"

namespace {

using namespace m1;

constexpr int TAPS = 4;
constexpr int HELD = TAPS - 1;  // convolution inputs in the conv_state of a channel

struct Step {
  int64_t rows, slot_count, dtype;
  const int64_t* slots;         // [rows]; a negative slot means none
  const float *taps, *bias;     // [channels of the convolution, TAPS] oldest first, [channels]
  void* conv_state;             // [slots, channels, HELD] oldest first
  float* ssm_state;
  int64_t conv_stride, ssm_stride;  // elements between the states of two slots
};

struct MambaStep {
  Step step;
  int64_t groups, kv_groups;
  const void *z, *x, *B, *C, *dt;  // rows are the strides below apart, in elements
  int64_t z_stride, x_stride, B_stride, C_stride, dt_stride;
  const float *A, *D;              // [D, 16], [D]
  void* y;                         // [rows, D]
};

struct SsdStep {
  Step step;
  int64_t groups, heads, P, N;     // groups of x and B
  const void* xBC;                 // [rows, groups P | groups N | heads N]
  int64_t stride;
  const float *dt, *A, *D;         // [rows, heads], [heads], [heads]
  void* y;                         // [rows, heads, P]
};

// Fills window with the convolution inputs of 16 channels, oldest tap first, and shifts the new token into the state.
template <class T>
void take_window(T* state, const T* token, float (&window)[TAPS][N]) {
  T held[N * HELD];
  std::memcpy(held, state, sizeof held);
  T columns[TAPS][N];
  for (int c = 0; c < N; ++c)
    for (int k = 0; k < HELD; ++k) columns[k][c] = held[c * HELD + k];
  std::memcpy(columns[HELD], token, sizeof columns[HELD]);
  for (int c = 0; c < N; ++c)
    for (int k = 0; k < HELD; ++k) state[c * HELD + k] = columns[k + 1][c];
  for (int k = 0; k < TAPS; ++k)
    for (int c = 0; c < N; c += W) store(window[k] + c, load(columns[k] + c));
}

// silu(conv) of the 16 channels from `channel` on.
void convolve(const Step& p, const float (&window)[TAPS][N], int64_t channel, float* u) {
  float taps[TAPS][N];
  for (int c = 0; c < N; ++c)
    for (int k = 0; k < TAPS; ++k) taps[k][c] = p.taps[(channel + c) * TAPS + k];
  for (int c = 0; c < N; c += W) {
    vec conv = load(p.bias + channel + c);
    for (int k = 0; k < TAPS; ++k) conv += load(taps[k] + c) * load(window[k] + c);
    store(u + c, conv * sigmoid(conv));
  }
}

template <class T>
void mamba_step(const MambaStep& p) {
  const int64_t channels = p.groups * N, rep = p.groups / p.kv_groups;
#pragma omp parallel for collapse(2) schedule(static)
  for (int64_t i = 0; i < p.step.rows; ++i) {
    for (int64_t kv = 0; kv < p.kv_groups; ++kv) {
      const int64_t slot = p.step.slots[i];
      T* y = (T*)p.y + i * channels + kv * rep * N;
      if (slot < 0) {
        std::memset(y, 0, rep * N * sizeof(T));
        continue;
      }
      T* conv_state = (T*)p.step.conv_state + slot * p.step.conv_stride + kv * N * HELD;
      float window[TAPS][N], B[N], C[N], u[N], dt[N];
      take_window(conv_state, (const T*)p.x + i * p.x_stride + kv * N, window);
      for (int c = 0; c < N; c += W) store(B + c, load((const T*)p.B + i * p.B_stride + kv * N + c));
      for (int64_t g = kv * rep; g < (kv + 1) * rep; ++g, y += N) {
        const int64_t channel = g * N;
        float* h = p.step.ssm_state + slot * p.step.ssm_stride + channel * N;
        convolve(p.step, window, channel, u);
        for (int c = 0; c < N; c += W) {
          store(C + c, load((const T*)p.C + i * p.C_stride + channel + c));
          store(dt + c, softplus(load((const T*)p.dt + i * p.dt_stride + channel + c)));
        }
        for (int c = 0; c < N; c += W) {
          vec products[W];
          for (int lane = 0; lane < W; ++lane) {
            const float step = dt[c + lane], input = step * u[c + lane];
            const float* A = p.A + (channel + c + lane) * N;
            float* row = h + (c + lane) * N;
            products[lane] = vec{};
            for (int n = 0; n < N; n += W) {
              const vec state = exp2_nonpositive(step * LOG2E * load(A + n)) * load(row + n) + input * load(B + n);
              store(row + n, state);
              products[lane] += state * load(C + n);
            }
          }
          const vec z = load((const T*)p.z + i * p.z_stride + channel + c);
          const vec out = sum_lanes(products) + load(p.D + channel + c) * load(u + c);
          store(y + c, out * z * sigmoid(z));
        }
      }
    }
  }
}

template <class T>
void ssd_step(const SsdStep& p) {
  const int64_t rep = p.heads / p.groups, P = p.P, states = p.N;
  const int64_t of_B = p.groups * P, of_C = of_B + p.groups * states;
#pragma omp parallel for collapse(2) schedule(static)
  for (int64_t i = 0; i < p.step.rows; ++i) {
    for (int64_t g = 0; g < p.groups; ++g) {
      const int64_t slot = p.step.slots[i];
      T* y = (T*)p.y + (i * p.heads + g * rep) * P;
      if (slot < 0) {
        std::memset(y, 0, rep * P * sizeof(T));
        continue;
      }
      std::vector<float> buffer(P + states + rep * states);
      float *x = buffer.data(), *B = x + P, *C = B + states;
      auto activate = [&](int64_t first, int64_t count, float* u) {
        for (int64_t channel = first; channel < first + count; channel += N) {
          float window[TAPS][N];
          T* conv_state = (T*)p.step.conv_state + slot * p.step.conv_stride + channel * HELD;
          take_window(conv_state, (const T*)p.xBC + i * p.stride + channel, window);
          convolve(p.step, window, channel, u + channel - first);
        }
      };
      activate(g * P, P, x);
      activate(of_B + g * states, states, B);
      activate(of_C + g * rep * states, rep * states, C);
      for (int64_t r = 0; r < rep; ++r, C += states) {
        const int64_t head = g * rep + r;
        const vec dt = softplus(splat(p.dt[i * p.heads + head]));
        const vec decay = exp2_nonpositive(dt * (p.A[head] * LOG2E));
        float* h = p.step.ssm_state + slot * p.step.ssm_stride + head * P * states;
        for (int64_t c = 0; c < P; c += W, y += W) {
          vec products[W];
          for (int lane = 0; lane < W; ++lane) {
            const vec input = dt * x[c + lane];
            float* row = h + (c + lane) * states;
            products[lane] = vec{};
            for (int64_t n = 0; n < states; n += W) {
              const vec state = decay * load(row + n) + input * load(B + n);
              store(row + n, state);
              products[lane] += state * load(C + n);
            }
          }
          store(y, sum_lanes(products) + p.D[head] * load(x + c));
        }
      }
    }
  }
}

// The first row whose slot is out of range, or -1.
int64_t bad_row(const Step& p) {
  for (int64_t i = 0; i < p.rows; ++i)
    if (p.slots[i] >= p.slot_count) return i;
  return -1;
}

}  // namespace

// Both return -1, or the first row whose slot is out of range, in which case nothing was written.
extern "C" int64_t m1_state_update(const MambaStep* p) {
  const int64_t bad = bad_row(p->step);
  if (bad < 0) with_type(p->step.dtype, [&](auto t) { mamba_step<decltype(t)>(*p); });
  return bad;
}

extern "C" int64_t m1_ssd_update(const SsdStep* p) {
  const int64_t bad = bad_row(p->step);
  if (bad < 0) with_type(p->step.dtype, [&](auto t) { ssd_step<decltype(t)>(*p); });
  return bad;
}
