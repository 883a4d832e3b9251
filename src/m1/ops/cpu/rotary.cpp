// Rotary embedding of new tokens. Keys and values go straight into their pages. The specification is rotate_and_cache in
// ops/reference.py. One thread handles each row.

#include <vector>

#include "vector.h"

namespace {

using namespace m1;

constexpr int64_t PARALLEL = 1 << 14;  // elements above which a second thread pays off

struct Cache {  // element (page, head, token, i) is at page * page_stride + head * head_stride + token * stride + i
  void* data;
  int64_t page_stride, head_stride, stride;
};

struct Rotate {
  int64_t rows, heads, kv_heads, head_dim, row_stride, head_stride, slot_count, slot_pages, page_count, page, dtype;
  const void* qkv;                   // [rows, heads + 2 kv_heads, head_dim]
  const void *cos, *sin;             // [rows, head_dim]
  const int32_t* page_table;         // [slot_count, slot_pages]
  const int64_t *slots, *positions;  // [rows]
  Cache k, v;
  void* out;                         // [rows, heads, head_dim]
};

int64_t page_of(const Rotate& p, int64_t row) {
  return p.page_table[p.slots[row] * p.slot_pages + p.positions[row] / p.page];
}

bool exists(const Rotate& p, int64_t row) {
  const int64_t slot = p.slots[row], position = p.positions[row];
  if (slot < 0) return true;
  if (slot >= p.slot_count || position < 0 || position >= p.slot_pages * p.page) return false;
  const int64_t page = page_of(p, row);
  return page >= 0 && page < p.page_count;
}

template <class T>
void rotate(const Rotate& p) {
  const int64_t half = p.head_dim / 2, heads = p.heads + 2 * p.kv_heads;
#pragma omp parallel if (p.rows * heads * p.head_dim > PARALLEL)
  {
    std::vector<float> buffer(4 * p.head_dim);
    float *cos = buffer.data(), *sin = cos + p.head_dim, *x = sin + p.head_dim, *y = x + p.head_dim;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < p.rows; ++row) {
      to_float((const T*)p.cos + row * p.head_dim, cos, half);
      to_float((const T*)p.sin + row * p.head_dim, sin, half);
      const int64_t page = p.slots[row] < 0 ? -1 : page_of(p, row), place = page < 0 ? 0 : p.positions[row] % p.page;
      for (int64_t head = 0; head < heads; ++head) {
        const T* from = (const T*)p.qkv + row * p.row_stride + head * p.head_stride;
        const bool query = head < p.heads, key = !query && head < p.heads + p.kv_heads;
        T* to = (T*)p.out + (row * p.heads + head) * p.head_dim;
        if (!query) {
          if (page < 0) break;
          const Cache& cache = key ? p.k : p.v;
          to = (T*)cache.data + page * cache.page_stride + place * cache.stride +
               (head - p.heads - (key ? 0 : p.kv_heads)) * cache.head_stride;
        }
        if (!query && !key) {
          std::memcpy(to, from, p.head_dim * sizeof(T));
          continue;
        }
        to_float(from, x, p.head_dim);
        for (int64_t i = 0; i < half; ++i) {
          y[i] = x[i] * cos[i] - x[half + i] * sin[i];
          y[half + i] = x[half + i] * cos[i] + x[i] * sin[i];
        }
        from_float(y, to, p.head_dim);
      }
    }
  }
}

}  // namespace

// Returns -1, or the first row whose slot, position or page is out of range, in which case nothing was written.
extern "C" int64_t m1_rotate_and_cache(const Rotate* p) {
  for (int64_t row = 0; row < p->rows; ++row)
    if (!exists(*p, row)) return row;
  with_type(p->dtype, [&](auto t) { rotate<decltype(t)>(*p); });
  return -1;
}
