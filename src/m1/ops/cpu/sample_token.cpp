// Draws one token per row. It finds the highest logit and sums e^((logit - highest) / temperature) block by block. Then
// it finds the block, and in it the token, at which the running sum passes the target. One thread handles each row.

#include <cmath>
#include <limits>
#include <vector>

#include "vector.h"

namespace {

using namespace m1;

constexpr int64_t BLOCK = 128;  // tokens per partial sum, so that no running sum has many terms
constexpr float NONE = -std::numeric_limits<float>::infinity();

struct Sample {
  int64_t rows, tokens, dtype;
  const void* logits;        // [rows, tokens]
  const double* uniform;     // [rows]
  const float* temperature;  // [rows]; 0 takes the most likely token
  int64_t* drawn;            // [rows]
  float* logprobs;           // [rows]
};

// W logits from the i-th on, padded with -inf after the last.
template <class T>
vec load_some(const T* logits, int64_t i, int64_t count) {
  if (i + W <= count) return load(logits + i);
  T tail[W];
  std::memcpy(tail, logits + i, (count - i) * sizeof(T));
  vec v = load(tail);
  for (int64_t lane = count - i; lane < W; ++lane) v[lane] = NONE;
  return v;
}

template <class T>
struct Row {
  const T* logits;
  int64_t count;
  float highest = NONE, scale;  // scale: turns logits into exponents of 2

  Row(const T* logits, int64_t count, float temperature)
      : logits(logits), count(count), scale(LOG2E / (temperature > 0 ? temperature : 1.0f)) {
    vec top = splat(NONE);
    for (int64_t i = 0; i < count; i += W) top = max(load_some(logits, i, count), top);
    for (int lane = 0; lane < W; ++lane) highest = top[lane] > highest ? top[lane] : highest;
  }

  // e^((logit - highest) / temperature) of W logits; 0 where it would be at most 2^-126, NaN where the logit is NaN.
  vec weights(int64_t i) const {
    const vec exponent = (load_some(logits, i, count) - highest) * scale;
    return exponent <= -126.0f ? vec{} : exp2_nonpositive(exponent);
  }

  float weight(int64_t i) const { return weights(i / W * W)[i % W]; }

  int64_t likeliest() const {
    for (int64_t i = 0; i < count; i += W) {
      const vec v = load_some(logits, i, count);
      for (int lane = 0; lane < W; ++lane)
        if (v[lane] == highest) return i + lane;
    }
    return 0;
  }
};

template <class T>
void sample(const Sample& p) {
  const int64_t blocks = (p.tokens + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static)
  for (int64_t r = 0; r < p.rows; ++r) {
    const Row<T> row((const T*)p.logits + r * p.tokens, p.tokens, p.temperature[r]);
    std::vector<float> sums(blocks);
    double total = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      vec partial[2] = {};
      const int64_t end = b * BLOCK + BLOCK < p.tokens ? b * BLOCK + BLOCK : p.tokens;
      for (int64_t i = b * BLOCK; i < end; i += W) partial[i / W % 2] += row.weights(i);
      total += sums[b] = sum(partial[0] + partial[1]);
    }
    int64_t token = 0;
    if (p.temperature[r] > 0) {
      const double target = p.uniform[r] * total;
      double passed = 0;
      // If rounding leaves no token past the target, the last one with any probability is drawn.
      int64_t block = 0;
      for (int64_t b = 0; b < blocks; ++b) {
        if (!(sums[b] > 0)) continue;
        if (b > block) block = b;
        if (passed + sums[b] > target) break;
        passed += sums[b];
      }
      for (int64_t i = block * BLOCK; i < p.tokens && i < (block + 1) * BLOCK; ++i) {
        const float weight = row.weight(i);
        if (!(weight > 0)) continue;
        token = i;
        passed += weight;
        if (passed > target) break;
      }
    } else {
      token = row.likeliest();
    }
    p.drawn[r] = token;
    const float exponent = (load_some(row.logits, token / W * W, p.tokens)[token % W] - row.highest) * row.scale;
    p.logprobs[r] = exponent * LN2 - (float)std::log(total);
  }
}

}  // namespace

extern "C" int64_t m1_sample_token(const Sample* p) {
  with_type(p->dtype, [&](auto t) { sample<decltype(t)>(*p); });
  return -1;
}
