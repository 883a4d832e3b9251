// Attention of one new query a head over the keys and values in a slot. The specification is decode_attention in
// ops/reference.py.
//
// Keys are split into parts of PART, small enough for a part's keys and values to stay in the L1 cache while the query
// heads of its group share them: each byte comes from memory once. A part leaves its maximum, sum and weighted values,
// which are then merged in order, so that the result depends on nothing but the row itself.

#include <algorithm>
#include <vector>

#include "vector.h"

namespace {

using namespace m1;

constexpr int PART = 128;  // keys
constexpr int QUERIES = 4; // of a group that go together; a larger group reads its part again, from the cache

struct Cache {  // element (slot, head, token, i) is at slot * slot_stride + head * head_stride + token * stride + i
  const void* data;
  int64_t slot_stride, head_stride, stride;
};

struct Attention {
  int64_t rows, slot_count, capacity, heads, kv_heads, head_dim, bfloat16;
  const int64_t *slots, *lengths;  // [rows]
  const float* q;                  // [rows, heads, head_dim], scaled by log2(e) and the softmax scale
  Cache k, v;
  void* out;                       // [rows, heads, head_dim]
};

struct Part {
  int64_t row, kv, first;
};

// Queries [Q, head_dim] against `count` keys: each query's maximum, sum of weights, and weighted values [head_dim].
template <class T, int Q>
void attend(const T* k, int64_t k_stride, const T* v, int64_t v_stride, const float* q, int64_t head_dim, int count,
            float* maximum, float* sum, float* values) {
  float weights[Q][PART];
  for (int first = 0; first < count; first += W) {
    const int some = std::min(W, count - first);
    vec products[Q][W] = {};
    for (int j = 0; j < some; ++j) {
      const T* key = k + (first + j) * k_stride;
      vec product[Q] = {};
      for (int64_t c = 0; c < head_dim; c += W) {
        const vec x = load(key + c);
        for (int i = 0; i < Q; ++i) product[i] += x * load(q + i * head_dim + c);
      }
      for (int i = 0; i < Q; ++i) products[i][j] = product[i];
    }
    for (int i = 0; i < Q; ++i) store(weights[i] + first, sum_lanes(products[i]));
  }
  for (int i = 0; i < Q; ++i) {
    maximum[i] = *std::max_element(weights[i], weights[i] + count);
    sum[i] = 0.0f;
    for (int j = count; j < (count + W - 1) / W * W; ++j) weights[i][j] = -1e30f;
    for (int j = 0; j < count; j += W) store(weights[i] + j, exp2_nonpositive(load(weights[i] + j) - maximum[i]));
    for (int j = 0; j < count; ++j) sum[i] += weights[i][j];
  }
  for (int64_t c = 0; c < head_dim; c += N) {
    vec total[Q][BLOCKS] = {};
    for (int j = 0; j < count; ++j) {
      const T* value = v + j * v_stride + c;
      for (int b = 0; b < BLOCKS; ++b) {
        const vec x = load(value + b * W);
        for (int i = 0; i < Q; ++i) total[i][b] += weights[i][j] * x;
      }
    }
    for (int i = 0; i < Q; ++i)
      for (int b = 0; b < BLOCKS; ++b) store(values + i * head_dim + c + b * W, total[i][b]);
  }
}

template <class T>
void decode(const Attention& p) {
  const int64_t group = p.heads / p.kv_heads, width = p.head_dim + 2;  // a part's result: values, maximum, sum
  std::vector<Part> parts;
  std::vector<int64_t> first_part(p.rows * p.kv_heads + 1);
  for (int64_t i = 0; i < p.rows; ++i)
    for (int64_t kv = 0; kv < p.kv_heads; ++kv) {
      first_part[i * p.kv_heads + kv] = parts.size();
      for (int64_t first = 0; p.slots[i] >= 0 && first < p.lengths[i]; first += PART) parts.push_back({i, kv, first});
    }
  first_part.back() = parts.size();
  std::vector<float> results(parts.size() * group * width);
#pragma omp parallel
  {
#pragma omp for schedule(dynamic, 4)
    for (size_t index = 0; index < parts.size(); ++index) {
      const Part& part = parts[index];
      const int64_t slot = p.slots[part.row];
      const int count = (int)std::min<int64_t>(PART, p.lengths[part.row] - part.first);
      const auto at = [&](const Cache& cache) {
        return (const T*)cache.data + slot * cache.slot_stride + part.kv * cache.head_stride + part.first * cache.stride;
      };
      float* values = results.data() + index * group * width;
      float *maxima = values + group * p.head_dim, *sums = maxima + group;
      const float* q = p.q + (part.row * p.heads + part.kv * group) * p.head_dim;
      for (int64_t i = 0; i < group; i += QUERIES) {
        const auto run = [&](auto attend) {
          attend(at(p.k), p.k.stride, at(p.v), p.v.stride, q + i * p.head_dim, p.head_dim, count, maxima + i, sums + i,
                 values + i * p.head_dim);
        };
        switch (group - i) {
          case 1: run(attend<T, 1>); break;
          case 2: run(attend<T, 2>); break;
          case 3: run(attend<T, 3>); break;
          default: run(attend<T, QUERIES>);
        }
      }
    }
#pragma omp for schedule(static)
    for (int64_t head = 0; head < p.rows * p.heads; ++head) {
      const int64_t unit = head / group, i = head % group, end = first_part[unit + 1];
      const auto maximum_of = [&](int64_t part) { return &results[part * group * width + group * p.head_dim + i]; };
      float maximum = -1e30f, sum = 0.0f;
      for (int64_t part = first_part[unit]; part < end; ++part) maximum = std::max(maximum, *maximum_of(part));
      for (int64_t part = first_part[unit]; part < end; ++part) {
        float* factor = maximum_of(part);  // takes the maximum's place
        *factor = exp2_nonpositive(splat(*factor - maximum))[0];
        sum += *factor * factor[group];  // sums stand behind the maxima
      }
      for (int64_t c = 0; c < p.head_dim; c += W) {
        vec total = {};
        for (int64_t part = first_part[unit]; part < end; ++part)
          total += *maximum_of(part) * load(&results[part * group * width + i * p.head_dim + c]);
        store((T*)p.out + head * p.head_dim + c, sum > 0.0f ? total / sum : total);
      }
    }
  }
}

}  // namespace

// Returns -1, or, before anything was written, the row whose slot or length doesn't exist.
extern "C" int64_t m1_decode_attention(const Attention* p) {
  for (int64_t i = 0; i < p->rows; ++i)
    if (p->slots[i] >= p->slot_count || p->lengths[i] < 0 || p->lengths[i] > p->capacity) return i;
  p->bfloat16 ? decode<bf16>(*p) : decode<float>(*p);
  return -1;
}
