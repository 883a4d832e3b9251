// Selective scan (Mamba-1, grouped heads) on the CPU: forward and backward.
//
//   h_t = exp(dt_t * A) * h_{t-1} + dt_t * x_t * B_t        y_t = <C_t, h_t> + D * x_t
//
// Channels come in groups of N = 16. A group has its own C (16 numbers a token) and shares its B with the
// `rep` neighbouring groups of one key-value group. One vector holds one state index n for the 16 channels of
// a group, so a group's whole 16x16 state is 16 vectors, B and C are broadcasts, and no lane ever waits for
// another one in the forward pass. The specification is ops/reference.py.
//
// Parallelism is over (sequence, key-value group): every output element then has exactly one writer.
// The forward pass keeps the state in front of every CHUNK tokens; the backward pass rebuilds the states inside
// a chunk from it and sweeps back.
//
// GCC/Clang vector extensions, no intrinsics: the same source is AVX-512, AVX2, NEON or plain C.

#include <cstdint>
#include <cstring>

namespace {

constexpr int N = 16;      // states per channel, and channels per group
constexpr int CHUNK = 16;  // tokens between saved states: rebuilt states and decays of a chunk stay in L1/L2

typedef float vec __attribute__((vector_size(N * sizeof(float))));
typedef int32_t ivec __attribute__((vector_size(N * sizeof(int32_t))));

inline vec load(const float* p) { vec v; std::memcpy(&v, p, sizeof v); return v; }
inline void store(float* p, vec v) { std::memcpy(p, &v, sizeof v); }

// exp(x) for x <= 0 (dt >= 0 and A < 0), relative error below 2e-7: x = k ln2 + r, then a polynomial in r
// and k added to the exponent bits. NaN goes through.
inline vec exp_nonpositive(vec x) {
  const vec low = vec{} - 87.0f;
  const vec magic = vec{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  vec clamped = x < low ? low : x;
  vec t = clamped * 1.44269504089f + magic;
  vec k = t - magic;
  vec r = clamped - k * 0.693359375f + k * 2.12194440e-4f;
  vec p = vec{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  ivec exponent = ((ivec)t - (ivec)magic) << 23;
  vec result = (vec)((ivec)p + exponent);
  return x == x ? result : x;
}

// r[n] = sum over lanes of v[n]: four levels of pairwise shuffles and adds instead of sixteen reductions.
inline vec sum_lanes(vec* v) {
#define PICK8(o) 0 + o, 1 + o, 2 + o, 3 + o, 4 + o, 5 + o, 6 + o, 7 + o, 16 + o, 17 + o, 18 + o, 19 + o, 20 + o, 21 + o, 22 + o, 23 + o
#define PICK4(o) 0 + o, 1 + o, 2 + o, 3 + o, 16 + o, 17 + o, 18 + o, 19 + o, 8 + o, 9 + o, 10 + o, 11 + o, 24 + o, 25 + o, 26 + o, 27 + o
#define PICK2(o) 0 + o, 1 + o, 16 + o, 17 + o, 4 + o, 5 + o, 20 + o, 21 + o, 8 + o, 9 + o, 24 + o, 25 + o, 12 + o, 13 + o, 28 + o, 29 + o
#define PICK1(o) 0 + o, 16 + o, 2 + o, 18 + o, 4 + o, 20 + o, 6 + o, 22 + o, 8 + o, 24 + o, 10 + o, 26 + o, 12 + o, 28 + o, 14 + o, 30 + o
#define MERGE(a, b, pick, w) (__builtin_shufflevector(a, b, pick(0)) + __builtin_shufflevector(a, b, pick(w)))
  for (int i = 0; i < 8; ++i) v[i] = MERGE(v[i], v[i + 8], PICK8, 8);
  for (int i = 0; i < 4; ++i) v[i] = MERGE(v[i], v[i + 4], PICK4, 4);
  for (int i = 0; i < 2; ++i) v[i] = MERGE(v[i], v[i + 2], PICK2, 2);
  return MERGE(v[0], v[1], PICK1, 1);
}

// [16 channels][16 states] row-major <-> one vector per state. Done once per (sequence, group).
inline void transpose_in(const float* src, vec* dst) {
  for (int n = 0; n < N; ++n)
    for (int c = 0; c < N; ++c) dst[n][c] = src[c * N + n];
}
inline void transpose_out(const vec* src, float* dst) {
  for (int n = 0; n < N; ++n)
    for (int c = 0; c < N; ++c) dst[c * N + n] = src[n][c];
}

inline bool starts_document(const int32_t* seq, int64_t t) { return seq && t > 0 && seq[t] != seq[t - 1]; }

}  // namespace

// Shapes (b sequences, T tokens, G groups of 16 channels, K key-value groups, D = 16 G):
//   x, dt, C [b, T, D]; B [b, T, 16 K]: token strides sx, sdt, sC, sB in floats, channels contiguous, sequences T
//   tokens apart; A [D, 16]; D [D]; seq [b, T] or null; h0, h_last [b, D, 16] (h0 may be null);
//   saved [b, ceil(T/16), G, 16, 16] or null; y [b, T, D] contiguous.
extern "C" void m1_selective_scan_forward(
    int64_t b, int64_t T, int64_t G, int64_t K, const float* x, int64_t sx, const float* dt, int64_t sdt,
    const float* A, const float* B, int64_t sB, const float* C, int64_t sC, const float* D, const int32_t* seq,
    const float* h0, float* y, float* h_last, float* saved) {
  const int64_t channels = G * N, rep = G / K, chunks = (T + CHUNK - 1) / CHUNK;
#pragma omp parallel for collapse(2) schedule(dynamic)
  for (int64_t i = 0; i < b; ++i) {
    for (int64_t g = 0; g < G; ++g) {
      const int32_t* seq_i = seq ? seq + i * T : nullptr;
      const int64_t offset = g * N, kv_offset = (g / rep) * N;
      vec a[N], h[N] = {};
      transpose_in(A + offset * N, a);
      if (h0) transpose_in(h0 + (i * channels + offset) * N, h);
      const vec skip = load(D + offset);
      for (int64_t t = 0; t < T; ++t) {
        if (saved && t % CHUNK == 0)
          std::memcpy(saved + ((i * chunks + t / CHUNK) * G + g) * N * N, h, sizeof h);
        if (starts_document(seq_i, t))
          for (int n = 0; n < N; ++n) h[n] = vec{};
        const int64_t row = i * T + t;
        const vec x_t = load(x + row * sx + offset), dt_t = load(dt + row * sdt + offset), dtx = dt_t * x_t;
        const float *B_t = B + row * sB + kv_offset, *C_t = C + row * sC + offset;
        vec y_t = skip * x_t;
        for (int n = 0; n < N; ++n) {
          h[n] = exp_nonpositive(dt_t * a[n]) * h[n] + dtx * B_t[n];
          y_t += h[n] * C_t[n];
        }
        store(y + row * channels + offset, y_t);
      }
      transpose_out(h, h_last + (i * channels + offset) * N);
    }
  }
}

// Gradients, all contiguous and fully written: dx, ddt, dC [b, T, D]; dB [b, T, 16 K]; dA [b, D, 16] and
// dD [b, D] per sequence (the caller sums over b); dh0 [b, D, 16]. dh_last may be null.
extern "C" void m1_selective_scan_backward(
    int64_t b, int64_t T, int64_t G, int64_t K, const float* x, int64_t sx, const float* dt, int64_t sdt,
    const float* A, const float* B, int64_t sB, const float* C, int64_t sC, const float* D, const int32_t* seq,
    const float* saved, const float* dy, const float* dh_last, float* dx, float* ddt, float* dA, float* dB, float* dC,
    float* dD, float* dh0) {
  const int64_t channels = G * N, rep = G / K, chunks = (T + CHUNK - 1) / CHUNK;
#pragma omp parallel for collapse(2) schedule(dynamic)
  for (int64_t i = 0; i < b; ++i) {
    for (int64_t kv = 0; kv < K; ++kv) {
      const int32_t* seq_i = seq ? seq + i * T : nullptr;
      for (int64_t g = kv * rep; g < (kv + 1) * rep; ++g) {
        const int64_t offset = g * N;
        vec a[N], grad_a[N] = {}, grad_h[N] = {};
        transpose_in(A + offset * N, a);
        if (dh_last) transpose_in(dh_last + (i * channels + offset) * N, grad_h);
        const vec skip = load(D + offset);
        vec grad_skip = {};
        for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
          const int64_t first = chunk * CHUNK, count = T - first < CHUNK ? T - first : CHUNK;
          vec before[CHUNK][N], after[CHUNK][N], decay[CHUNK][N];  // state in front of and behind token j
          vec h[N];
          std::memcpy(h, saved + ((i * chunks + chunk) * G + g) * N * N, sizeof h);
          for (int64_t j = 0; j < count; ++j) {
            const int64_t t = first + j, row = i * T + t;
            if (starts_document(seq_i, t))
              for (int n = 0; n < N; ++n) h[n] = vec{};
            const vec dt_t = load(dt + row * sdt + offset), dtx = dt_t * load(x + row * sx + offset);
            const float* B_t = B + row * sB + kv * N;
            for (int n = 0; n < N; ++n) {
              before[j][n] = h[n];
              decay[j][n] = exp_nonpositive(dt_t * a[n]);
              h[n] = decay[j][n] * h[n] + dtx * B_t[n];
              after[j][n] = h[n];
            }
          }
          for (int64_t j = count - 1; j >= 0; --j) {
            const int64_t t = first + j, row = i * T + t;
            const vec x_t = load(x + row * sx + offset), dt_t = load(dt + row * sdt + offset);
            const vec dtx = dt_t * x_t, dy_t = load(dy + row * channels + offset);
            const float *B_t = B + row * sB + kv * N, *C_t = C + row * sC + offset;
            vec to_B[N], to_C[N], along_B = {}, grad_dt = {};
            for (int n = 0; n < N; ++n) {
              const vec gh = grad_h[n] + dy_t * C_t[n];
              to_C[n] = dy_t * after[j][n];
              to_B[n] = gh * dtx;
              along_B += gh * B_t[n];
              const vec grad_log_decay = gh * before[j][n] * decay[j][n];
              grad_a[n] += grad_log_decay * dt_t;
              grad_dt += grad_log_decay * a[n];
              grad_h[n] = gh * decay[j][n];
            }
            if (starts_document(seq_i, t))
              for (int n = 0; n < N; ++n) grad_h[n] = vec{};
            grad_skip += dy_t * x_t;
            store(dx + row * channels + offset, skip * dy_t + along_B * dt_t);
            store(ddt + row * channels + offset, grad_dt + along_B * x_t);
            store(dC + row * channels + offset, sum_lanes(to_C));
            float* dB_t = dB + (row * K + kv) * N;
            const vec grad_B = sum_lanes(to_B);
            store(dB_t, g == kv * rep ? grad_B : load(dB_t) + grad_B);
          }
        }
        transpose_out(grad_a, dA + (i * channels + offset) * N);
        transpose_out(grad_h, dh0 + (i * channels + offset) * N);
        store(dD + i * channels + offset, grad_skip);
      }
    }
  }
}
