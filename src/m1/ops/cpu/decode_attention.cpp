// Attention of one new query per head over the keys and values in a slot's pages. The specification is decode_attention
// in ops/reference.py.
//
// Keys are split into parts of PART keys, or of a page's if those are fewer. So a part never crosses a page. A part's keys and values fit in the L1 cache while the query heads of its
// group share them, so each byte is read from memory once. Each part produces a maximum, a sum and weighted values.
// They are merged in order, so the result depends only on the row itself.

#include <algorithm>
#include <type_traits>
#include <vector>

#include "vector.h"

namespace {

using namespace m1;

constexpr int PART = 128;  // keys
constexpr int QUERIES = 4; // heads of a group processed together; a larger group rereads its part from the cache

struct Cache {  // element (page, head, token, i) is at page * page_stride + head * head_stride + token * stride + i
  const void* data;
  int64_t page_stride, head_stride, stride;
};

struct Attention {
  int64_t rows, slot_count, slot_pages, page_count, page, heads, kv_heads, head_dim, dtype;
  double scale;                    // of the scores, times log2(e)
  const int64_t *slots, *lengths;  // [rows]
  const int32_t* page_table;       // [slot_count, slot_pages]
  const void* q;                   // [rows, heads, head_dim]
  Cache k, v;
  void* out;                       // [rows, heads, head_dim]
};

struct Part {
  int64_t row, kv, first;
};

// Widens 16 channels of a key or value to float32. AVX2 is fastest if it puts the even bfloat16 channels first and then
// the odd ones, as these are already in the upper half of 32 bits. Queries are permuted to this order, outputs back.
template <class T>
inline void widen(const T* p, vec (&v)[BLOCKS]) {
  for (int b = 0; b < BLOCKS; ++b) v[b] = load(p + b * W);
}

inline void widen(const bf16* p, vec (&v)[BLOCKS]) {
  if constexpr (BLOCKS == 2) {
    uvec pairs;
    std::memcpy(&pairs, p, sizeof pairs);
    v[0] = (vec)(pairs << 16);
    v[1] = (vec)(pairs & 0xffff0000u);
  } else {
    for (int b = 0; b < BLOCKS; ++b) v[b] = load(p + b * W);
  }
}

template <class T>
int64_t place(int64_t channel) {  // the position of a channel in that order
  const bool apart = std::is_same_v<T, bf16> && BLOCKS == 2;
  return apart ? channel / N * N + channel % 2 * W + channel % N / 2 : channel;
}

// Q queries [head_dim] against `count` keys: per query the maximum, sum of weights, and weighted values [head_dim].
template <class T, int Q>
struct Attend {
  const T *k, *v;
  int64_t k_stride, v_stride, head_dim;
  int count;
  const float* q;
  float *maximum, *sum, *values;

  void run() const {
    float weights[Q][PART];
    for (int first = 0; first < count; first += W) {
      const int some = std::min(W, count - first);
      vec products[Q][W];
      for (int j = some; j < W; ++j)
        for (int i = 0; i < Q; ++i) products[i][j] = vec{};
      for (int j = 0; j + 1 < some; j += 2) multiply<2>(first, j, products);
      if (some % 2) multiply<1>(first, some - 1, products);
      for (int i = 0; i < Q; ++i) store(weights[i] + first, sum_lanes(products[i]));
    }
    for (int i = 0; i < Q; ++i) exponentiate(weights[i], maximum[i], sum[i]);
    for (int64_t c = 0; c < head_dim; c += N) weigh(weights, c);
  }

  // Products with the K keys from first + j on, with lanes still to be summed. Prefetches the values of these keys.
  template <int K>
  void multiply(int first, int j, vec (&products)[Q][W]) const {
    const T *key = k + (first + j) * k_stride, *value = v + (first + j) * v_stride;
    vec product[K][Q] = {};
    for (int64_t c = 0; c < head_dim; c += N) {
      vec x[K][BLOCKS];
      for (int m = 0; m < K; ++m) {
        widen(key + m * k_stride + c, x[m]);
        __builtin_prefetch(value + m * v_stride + c);
      }
      for (int b = 0; b < BLOCKS; ++b)
        for (int i = 0; i < Q; ++i)
          for (int m = 0; m < K; ++m) product[m][i] += x[m][b] * load(q + i * head_dim + c + b * W);
    }
    for (int i = 0; i < Q; ++i)
      for (int m = 0; m < K; ++m) products[i][j + m] = product[m][i];
  }

  void exponentiate(float* weight, float& maximum, float& sum) const {
    const int end = (count + W - 1) / W * W;
    for (int j = count; j < end; ++j) weight[j] = -1e30f;
    vec highest = load(weight), total = {};
    for (int j = W; j < end; j += W) highest = max(highest, load(weight + j));
    maximum = highest[0];
    for (int lane = 1; lane < W; ++lane) maximum = std::max(maximum, highest[lane]);
    for (int j = 0; j < end; j += W) {
      const vec x = exp2_nonpositive(load(weight + j) - maximum);
      store(weight + j, x);
      total += x;
    }
    sum = 0.0f;
    for (int lane = 0; lane < W; ++lane) sum += total[lane];
  }

  // Weighted values of 16 channels from c on. With more, the totals of 3 queries wouldn't fit in AVX2's registers.
  void weigh(const float (&weights)[Q][PART], int64_t c) const {
    vec total[Q][BLOCKS] = {};
    for (int j = 0; j < count; ++j) {
      vec x[BLOCKS];
      widen(v + j * v_stride + c, x);
      for (int i = 0; i < Q; ++i)
        for (int b = 0; b < BLOCKS; ++b) total[i][b] += weights[i][j] * x[b];
    }
    for (int i = 0; i < Q; ++i)
      for (int b = 0; b < BLOCKS; ++b) store(values + i * head_dim + c + b * W, total[i][b]);
  }
};

template <class T>
void decode(const Attention& p) {
  const int64_t size = std::min<int64_t>(PART, p.page);
  const int64_t group = p.heads / p.kv_heads, width = p.head_dim + 2;  // per head of a part: values, maximum, sum
  std::vector<Part> parts;
  std::vector<int64_t> first_part(p.rows * p.kv_heads + 1);
  for (int64_t i = 0; i < p.rows; ++i)
    for (int64_t kv = 0; kv < p.kv_heads; ++kv) {
      first_part[i * p.kv_heads + kv] = parts.size();
      for (int64_t first = 0; p.slots[i] >= 0 && first < p.lengths[i]; first += size) parts.push_back({i, kv, first});
    }
  first_part.back() = parts.size();
  // Reused by later calls: allocating memory would take longer than writing to it.
  static thread_local std::vector<float> kept_results, kept_queries;
  kept_results.resize(std::max(kept_results.size(), parts.size() * group * width));
  kept_queries.resize(std::max<size_t>(kept_queries.size(), p.rows * p.heads * p.head_dim));
  float *results = kept_results.data(), *queries = kept_queries.data();
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t head = 0; head < p.rows * p.heads; ++head)
      for (int64_t c = 0; c < p.head_dim; c += N) {
        float scaled[N];
        for (int i = 0; i < N; i += W)
          store(scaled + i, load((const T*)p.q + head * p.head_dim + c + i) * (float)p.scale);
        for (int i = 0; i < N; ++i) queries[head * p.head_dim + place<T>(c + i)] = scaled[i];
      }
#pragma omp for schedule(dynamic, 4)
    for (size_t index = 0; index < parts.size(); ++index) {
      const Part& part = parts[index];
      const int64_t page = p.page_table[p.slots[part.row] * p.slot_pages + part.first / p.page];
      const int count = (int)std::min<int64_t>(size, p.lengths[part.row] - part.first);
      const auto at = [&](const Cache& cache) {
        const int64_t in_page = part.kv * cache.head_stride + part.first % p.page * cache.stride;
        return (const T*)cache.data + page * cache.page_stride + in_page;
      };
      float* values = results + index * group * width;
      float *maxima = values + group * p.head_dim, *sums = maxima + group;
      const float* q = queries + (part.row * p.heads + part.kv * group) * p.head_dim;
      for (int64_t i = 0; i < group; i += QUERIES) {
        const auto attend = [&](auto some) {
          Attend<T, some>{at(p.k), at(p.v), p.k.stride, p.v.stride, p.head_dim, count, q + i * p.head_dim, maxima + i,
                          sums + i, values + i * p.head_dim}.run();
        };
        switch (group - i) {
          case 1: attend(std::integral_constant<int, 1>()); break;
          case 2: attend(std::integral_constant<int, 2>()); break;
          case 3: attend(std::integral_constant<int, 3>()); break;
          default: attend(std::integral_constant<int, QUERIES>());
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
        float* factor = maximum_of(part);  // overwrites the maximum
        *factor = exp2_nonpositive(splat(*factor - maximum))[0];
        sum += *factor * factor[group];  // the sums are stored after the maxima
      }
      for (int64_t c = 0; c < p.head_dim; c += W) {
        vec total = {};
        for (int64_t part = first_part[unit]; part < end; ++part)
          total += *maximum_of(part) * load(&results[part * group * width + i * p.head_dim + c]);
        store(queries + head * p.head_dim + c, sum > 0.0f ? total / sum : total);  // overwrites the query
      }
      for (int64_t c = 0; c < p.head_dim; c += N) {
        float ordered[N];
        for (int i = 0; i < N; ++i) ordered[i] = queries[head * p.head_dim + place<T>(c + i)];
        for (int i = 0; i < N; i += W) store((T*)p.out + head * p.head_dim + c + i, load(ordered + i));
      }
    }
  }
}

bool exists(const Attention& p, int64_t row) {
  const int64_t slot = p.slots[row], length = p.lengths[row];
  if (slot >= p.slot_count || length < 0 || length > p.slot_pages * p.page) return false;
  if (slot < 0) return true;
  const int32_t* pages = p.page_table + slot * p.slot_pages;
  return std::all_of(pages, pages + (length + p.page - 1) / p.page,
                     [&](int32_t page) { return page >= 0 && page < p.page_count; });
}

}  // namespace

// Returns -1, or the first row whose slot, length or pages are out of range, in which case nothing was written.
extern "C" int64_t m1_decode_attention(const Attention* p) {
  for (int64_t i = 0; i < p->rows; ++i)
    if (!exists(*p, i)) return i;
  with_type(p->dtype, [&](auto t) { decode<decltype(t)>(*p); });
  return -1;
}
