// The selective scan, forward and backward, with convolution, silu, softplus, skip and gate in one pass over the
// tokens. The specification is selective_scan in ops/reference.py.
//
// Channels form groups of 16, and a vector holds one state index n for the channels of a group. So B and C are
// broadcasts, and the forward pass needs no sums over lanes. A unit of work is one (sequence, key-value group), so
// every output element has exactly one writer. Tokens are processed in chunks: a chunk's activations are converted into
// float32 buffers that stay in the L1 cache, then scanned. The forward pass saves the state before every chunk. The
// backward pass takes chunks from last to first, recomputes the states inside each, and sweeps back over its tokens.

#include <algorithm>
#include <vector>

#include "vector.h"

namespace {

using namespace m1;

constexpr int CHUNK = 16;  // tokens; CHUNK["cpu"] in ops/selective_scan.py
constexpr int TAPS = 4;    // convolution taps
constexpr int HELD = 4;         // states per channel that stay in registers while a chunk goes by
constexpr int HALO = TAPS - 1;  // convolution inputs needed from before a chunk

typedef float Rows[CHUNK][N];  // one value per token and channel of a group
typedef float State[N][N];     // [n][channel]

struct Activation {  // [b, T, ...]: channels contiguous, tokens `stride` elements apart, sequences T tokens apart
  const void* data;
  int64_t stride;
};

struct Inputs {
  int64_t batch, length, groups, kv_groups, dtype;
  Activation z, x, B, C, dt;       // D channels, or 16 kv_groups for x and B
  const float *A, *D;              // [D, 16], [D]
  const float *taps, *bias;        // [TAPS, D] oldest first, [D]
  const int32_t* seq_idx;          // [b, T] or null
  const void* conv_state;          // [b, 16 kv_groups, HALO] oldest first, or null
  const int64_t *cu_seqlens, *slots;  // [b+1], [b]; null unless sequences have lengths and states in slots, [slots, ...]

  int64_t start(int64_t i) const { return cu_seqlens ? cu_seqlens[i] : i * length; }  // the sequence's first token
  int64_t tokens(int64_t i) const { return cu_seqlens ? cu_seqlens[i + 1] - cu_seqlens[i] : length; }
  int64_t slot(int64_t i) const { return slots ? slots[i] : i; }  // the place of its states
};

struct Forward {
  Inputs in;
  const float* ssm_state;    // [b, D, 16] or null
  void* y;                   // [b, T, D]
  float *ssm_last, *saved;   // [b, D, 16]; [b, chunks, groups, n, channel] or null
  void* conv_last;           // as conv_state, or null
};

struct Backward {
  Inputs in;
  const float* saved;
  const void* dy;                        // [b, T, D]
  const float* dssm_last;                // [b, D, 16]
  void *dz, *dx, *dB, *dC, *ddt;         // [b, T, ...] contiguous
  float *dA, *dD, *dtaps, *dbias;        // per sequence, summed by the caller: [b, D, 16], [b, D], [b, TAPS, D], [b, D]
  void* dconv_state;                     // [b, 16 kv_groups, HALO]
  float* dssm_state;                     // [b, D, 16]
};

void transposed(const float* from, float* to, float factor = 1.0f) {  // [16][16]
  for (int i = 0; i < N; ++i)
    for (int j = 0; j < N; ++j) to[j * N + i] = from[i * N + j] * factor;
}

// The chunks of one sequence and key-value group: `enter` loads one of them into float32 buffers.
template <class T>
struct Chunk {
  const Inputs& in;
  const int64_t start, length, slot, kv;
  const int32_t* const seq;
  int64_t first = 0;
  int count = 0;
  bool starts[CHUNK];           // token j begins a document: the state before it is cleared
  float reaches[CHUNK][TAPS];   // 1 if token j - k is in token j's document, else 0
  float x[HALO + CHUNK][N];     // convolution inputs
  Rows B;

  Chunk(const Inputs& in, int64_t sequence, int64_t kv)
      : in(in), start(in.start(sequence)), length(in.tokens(sequence)), slot(in.slot(sequence)), kv(kv),
        seq(in.seq_idx ? in.seq_idx + start : nullptr) {}

  const T* row(const Activation& a, int64_t t, int64_t group) const {
    return (const T*)a.data + (start + t) * a.stride + group * N;
  }

  int32_t document(int64_t t) const { return seq[std::max<int64_t>(t, 0)]; }  // conv_state is in token 0's

  void bring(const T* from, float* to) const {
    for (int c = 0; c < N; c += W) store(to + c, load(from + c));
  }

  void bring_column(const T* from, float* to) const {  // one column of [N][HALO]
    T column[N];
    for (int c = 0; c < N; ++c) column[c] = from[c * HALO];
    bring(column, to);
  }

  void enter(int64_t chunk) {
    first = chunk * CHUNK;
    count = (int)std::min<int64_t>(CHUNK, length - first);
    const int64_t of_kv = (slot * in.kv_groups + kv) * N * HALO;
    const T* conv_state = in.conv_state ? (const T*)in.conv_state + of_kv : nullptr;
    for (int j = -HALO; j < count; ++j) {
      const int64_t t = first + j;
      float* to = x[j + HALO];
      if (t >= 0) bring(row(in.x, t, kv), to);
      else if (conv_state) bring_column(conv_state + t + HALO, to);
      else std::memset(to, 0, sizeof *x);
    }
    for (int j = 0; j < count; ++j) {
      const int64_t t = first + j;
      bring(row(in.B, t, kv), B[j]);
      starts[j] = seq && t > 0 && seq[t] != seq[t - 1];
      for (int k = 0; k < TAPS; ++k) reaches[j][k] = !seq || document(t - k) == seq[t];
    }
  }

  // Prefetches another chunk's activations: their addresses are too far apart for the hardware prefetcher.
  void prefetch(int64_t t, int64_t group) const {
    if (t < 0 || t >= length) return;
    for (const Activation* a : {&in.z, &in.C, &in.dt}) __builtin_prefetch(row(*a, t, group));
    for (const Activation* a : {&in.x, &in.B}) __builtin_prefetch(row(*a, t, kv));
  }
};

// A group's activations in a chunk: u = silu(conv(x)), dt = softplus(dt), gate = silu(z), and C.
struct Group {
  Rows u, dt, gate, C;
};

// The derivatives of a group's activations with respect to conv(x), dt and z.
struct Slopes {
  Rows u, dt, gate;
};

template <class T>
void activate(const Chunk<T>& chunk, int64_t g, Group& out, Slopes* slopes) {
  const Inputs& in = chunk.in;
  const int64_t channels = in.groups * N;
  for (int c = 0; c < N; c += W) {
    const int64_t channel = g * N + c;
    const vec bias = load(in.bias + channel);
    vec taps[TAPS];
    for (int k = 0; k < TAPS; ++k) taps[k] = load(in.taps + (HALO - k) * channels + channel);
    for (int j = 0; j < chunk.count; ++j) {
      const int64_t t = chunk.first + j;
      vec conv = bias;
      for (int k = 0; k < TAPS; ++k) conv += taps[k] * chunk.reaches[j][k] * load(chunk.x[j + HALO - k] + c);
      const vec conv_sigmoid = sigmoid(conv);
      const vec dt = load(chunk.row(in.dt, t, g) + c), z = load(chunk.row(in.z, t, g) + c), z_sigmoid = sigmoid(z);
      store(out.u[j] + c, conv * conv_sigmoid);
      store(out.dt[j] + c, softplus(dt));
      store(out.gate[j] + c, z * z_sigmoid);
      store(out.C[j] + c, load(chunk.row(in.C, t, g) + c));
      if (slopes) {
        store(slopes->u[j] + c, conv_sigmoid * (1.0f + conv * (1.0f - conv_sigmoid)));
        store(slopes->dt[j] + c, sigmoid(dt));
        store(slopes->gate[j] + c, z_sigmoid * (1.0f + z * (1.0f - z_sigmoid)));
      }
    }
  }
}

template <class T>
void forward(const Forward& p) {
  const Inputs& in = p.in;
  const int64_t channels = in.groups * N, rep = in.groups / in.kv_groups;
#pragma omp parallel for collapse(2) schedule(dynamic)
  for (int64_t i = 0; i < in.batch; ++i) {
    for (int64_t kv = 0; kv < in.kv_groups; ++kv) {
      Chunk<T> chunk(in, i, kv);
      const int64_t chunks = (chunk.length + CHUNK - 1) / CHUNK;
      T* const y_start = (T*)p.y + chunk.start * channels + kv * rep * N;
      if (chunk.slot < 0) {
        for (int64_t t = 0; t < chunk.length; ++t) std::memset(y_start + t * channels, 0, rep * N * sizeof(T));
        continue;
      }
      Group group;
      std::vector<float> scratch(2 * rep * N * N);
      State* const A = (State*)scratch.data();  // times log2(e)
      State* const states = A + rep;
      const int64_t of_kv = (chunk.slot * channels + kv * rep * N) * N;
      for (int64_t r = 0; r < rep; ++r) {
        transposed(in.A + (kv * rep + r) * N * N, A[r][0], LOG2E);
        if (p.ssm_state) transposed(p.ssm_state + of_kv + r * N * N, states[r][0]);
      }
      for (int64_t index = 0; index < chunks; ++index) {
        chunk.enter(index);
        for (int64_t r = 0; r < rep; ++r) {
          const int64_t g = kv * rep + r;
          if (p.saved) std::memcpy(p.saved + ((i * chunks + index) * in.groups + g) * N * N, states[r], sizeof *states);
          activate(chunk, g, group, (Slopes*)nullptr);
          for (int c = 0; c < N; c += W) {
            const vec skip = load(in.D + g * N + c);
            vec y[CHUNK];
            for (int j = 0; j < chunk.count; ++j) {
              if (c == 0) chunk.prefetch(chunk.first + j + CHUNK, g);
              y[j] = skip * load(group.u[j] + c);
            }
            for (int from = 0; from < N; from += HELD) {
              vec h[HELD];
              for (int n = 0; n < HELD; ++n) h[n] = load(states[r][from + n] + c);
              for (int j = 0; j < chunk.count; ++j) {
                if (chunk.starts[j])
                  for (int n = 0; n < HELD; ++n) h[n] = vec{};
                const vec dt = load(group.dt[j] + c), dtu = dt * load(group.u[j] + c);
                for (int n = 0; n < HELD; ++n) {
                  h[n] = exp2_nonpositive(dt * load(A[r][from + n] + c)) * h[n] + dtu * chunk.B[j][from + n];
                  y[j] += h[n] * group.C[j][from + n];
                }
              }
              for (int n = 0; n < HELD; ++n) store(states[r][from + n] + c, h[n]);
            }
            for (int j = 0; j < chunk.count; ++j)
              store(y_start + (chunk.first + j) * channels + r * N + c, y[j] * load(group.gate[j] + c));
          }
        }
      }
      for (int64_t r = 0; r < rep; ++r) transposed(states[r][0], p.ssm_last + of_kv + r * N * N);
      if (!p.conv_last || !chunk.length) continue;
      for (int k = 0; k < HALO; ++k) {
        T column[N];
        for (int c = 0; c < N; c += W) store(column + c, load(chunk.x[chunk.count + k] + c));
        for (int c = 0; c < N; ++c) ((T*)p.conv_last)[((chunk.slot * in.kv_groups + kv) * N + c) * HALO + k] = column[c];
      }
    }
  }
}

// What the backward pass carries from chunk to chunk, per group.
struct Carry {
  State A, dh, dA;  // A times log2(e)
  float dD[N], dtaps[TAPS][N], dbias[N];
};

template <class T>
void backward(const Backward& p) {
  const Inputs& in = p.in;
  const int64_t channels = in.groups * N, rep = in.groups / in.kv_groups, chunks = (in.length + CHUNK - 1) / CHUNK;
#pragma omp parallel for collapse(2) schedule(dynamic)
  for (int64_t i = 0; i < in.batch; ++i) {
    for (int64_t kv = 0; kv < in.kv_groups; ++kv) {
      Chunk<T> chunk(in, i, kv);
      Group group;
      Slopes slopes;
      std::vector<Carry> carries(rep, Carry{});
      const int64_t of_kv = (i * channels + kv * rep * N) * N;
      for (int64_t r = 0; r < rep; ++r) {
        transposed(in.A + (kv * rep + r) * N * N, carries[r].A[0], LOG2E);
        transposed(p.dssm_last + of_kv + r * N * N, carries[r].dh[0]);
      }
      float dx[HALO + CHUNK][N] = {};  // including the inputs before the chunk that its taps read
      Rows dB, dconv;
      for (int64_t index = chunks - 1; index >= 0; --index) {
        chunk.enter(index);
        std::memset(dB, 0, sizeof dB);
        for (int64_t r = 0; r < rep; ++r) {
          const int64_t g = kv * rep + r;
          Carry& carry = carries[r];
          activate(chunk, g, group, &slopes);
          Rows dC = {};
          for (int c = 0; c < N; c += W) {
            vec decay[CHUNK][N], kept[CHUNK][N];  // kept: the decayed state from before token j
            vec h[N];
            const float* saved = p.saved + ((i * chunks + index) * in.groups + g) * N * N;
            for (int n = 0; n < N; ++n) h[n] = load(saved + n * N + c);
            for (int j = 0; j < chunk.count; ++j) {
              if (c == 0) chunk.prefetch(chunk.first + j - CHUNK, g);
              if (chunk.starts[j])
                for (int n = 0; n < N; ++n) h[n] = vec{};
              const vec dt = load(group.dt[j] + c), dtu = dt * load(group.u[j] + c);
              for (int n = 0; n < N; ++n) {
                decay[j][n] = exp2_nonpositive(dt * load(carry.A[n] + c));
                kept[j][n] = decay[j][n] * h[n];
                h[n] = kept[j][n] + dtu * chunk.B[j][n];
              }
            }
            const vec skip = load(in.D + g * N + c);
            vec dh[N], dA[N], dD = load(carry.dD + c);
            for (int n = 0; n < N; ++n) dh[n] = load(carry.dh[n] + c), dA[n] = load(carry.dA[n] + c);
            for (int j = chunk.count - 1; j >= 0; --j) {
              const int64_t row = (i * in.length + chunk.first + j) * channels + g * N + c;
              const vec u = load(group.u[j] + c), dt = load(group.dt[j] + c), dtu = dt * u;
              const vec dout = load((const T*)p.dy + row), dy = dout * load(group.gate[j] + c);
              vec to_B[N], to_C[N], y = skip * u, along_B = {}, along_A = {};
              for (int n = 0; n < N; ++n) {
                const vec after = kept[j][n] + dtu * chunk.B[j][n];
                dh[n] += dy * group.C[j][n];
                y += after * group.C[j][n];
                to_C[n] = dy * after;
                to_B[n] = dtu * dh[n];
                along_B += dh[n] * chunk.B[j][n];
                const vec dlog_decay = dh[n] * kept[j][n];
                along_A += dlog_decay * load(carry.A[n] + c);
                dA[n] += dlog_decay * dt;
                dh[n] *= decay[j][n];
              }
              if (chunk.starts[j])
                for (int n = 0; n < N; ++n) dh[n] = vec{};
              for (int n = 0; n < N; n += W) {
                store(dC[j] + n, load(dC[j] + n) + sum_lanes(to_C + n));
                store(dB[j] + n, load(dB[j] + n) + sum_lanes(to_B + n));
              }
              dD += dy * u;
              store(dconv[j] + c, (skip * dy + along_B * dt) * load(slopes.u[j] + c));
              store((T*)p.ddt + row, (LN2 * along_A + along_B * u) * load(slopes.dt[j] + c));
              store((T*)p.dz + row, dout * y * load(slopes.gate[j] + c));
            }
            for (int n = 0; n < N; ++n) store(carry.dh[n] + c, dh[n]), store(carry.dA[n] + c, dA[n]);
            store(carry.dD + c, dD);
          }
          for (int j = 0; j < chunk.count; ++j)
            for (int c = 0; c < N; c += W) {
              store((T*)p.dC + (i * in.length + chunk.first + j) * channels + g * N + c, load(dC[j] + c));
              const vec d = load(dconv[j] + c);
              store(carry.dbias + c, load(carry.dbias + c) + d);
              for (int k = 0; k < TAPS; ++k) {
                const vec reached = d * chunk.reaches[j][k];
                float *to_tap = carry.dtaps[HALO - k] + c, *to_x = dx[j + HALO - k] + c;
                store(to_tap, load(to_tap) + reached * load(chunk.x[j + HALO - k] + c));
                store(to_x, load(to_x) + reached * load(in.taps + (HALO - k) * channels + g * N + c));
              }
            }
        }
        for (int j = 0; j < chunk.count; ++j) {
          const int64_t row = ((i * in.length + chunk.first + j) * in.kv_groups + kv) * N;
          for (int c = 0; c < N; c += W) {
            store((T*)p.dx + row + c, load(dx[j + HALO] + c));
            store((T*)p.dB + row + c, load(dB[j] + c));
          }
        }
        // gradients of inputs before this chunk belong to the last tokens of the previous chunk
        std::memcpy(dx[CHUNK], dx[0], HALO * sizeof *dx);
        std::memset(dx[0], 0, CHUNK * sizeof *dx);
      }
      for (int k = 0; k < HALO; ++k) {
        T column[N];
        for (int c = 0; c < N; c += W) store(column + c, load(dx[CHUNK + k] + c));
        for (int c = 0; c < N; ++c) ((T*)p.dconv_state)[((i * in.kv_groups + kv) * N + c) * HALO + k] = column[c];
      }
      for (int64_t r = 0; r < rep; ++r) {
        const Carry& carry = carries[r];
        const int64_t channel = (kv * rep + r) * N;
        transposed(carry.dA[0], p.dA + of_kv + r * N * N);
        transposed(carry.dh[0], p.dssm_state + of_kv + r * N * N);
        std::memcpy(p.dD + i * channels + channel, carry.dD, sizeof carry.dD);
        std::memcpy(p.dbias + i * channels + channel, carry.dbias, sizeof carry.dbias);
        for (int k = 0; k < TAPS; ++k)
          std::memcpy(p.dtaps + (i * TAPS + k) * channels + channel, carry.dtaps[k], sizeof *carry.dtaps);
      }
    }
  }
}

}  // namespace

extern "C" void m1_selective_scan_forward(const Forward* p) {
  with_type(p->in.dtype, [&](auto t) { forward<decltype(t)>(*p); });
}

extern "C" void m1_selective_scan_backward(const Backward* p) {
  with_type(p->in.dtype, [&](auto t) { backward<decltype(t)>(*p); });
}
