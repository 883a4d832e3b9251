// Causal attention of chunks of prompts over the keys and values in their slots' pages. The specification is
// prefill_attention in ops/reference.py.
//
// A unit of work is a few tokens of a chunk and one key-value head, with all query heads of its group. Keys and values
// are packed in panels (tile.h), so that scores and weighted values are products of tiles of rows. A row keeps a maximum,
// a sum and weighted values while blocks of BLOCK keys go by (Dao et al. 2022). Blocks begin at multiples of BLOCK, and
// keys after a row's own have weight 0. So the result of finite values depends neither on other rows nor on where the chunk
// begins.

#include <cmath>
#include <vector>

#include "tile.h"

namespace {

using namespace m1;

constexpr int BLOCK = 128;  // keys
constexpr int PART = 64;    // tokens per unit
constexpr float LOWEST = -1e30f;

struct Cache {  // element (page, head, token, i) is at page * page_stride + head * head_stride + token * stride + i
  const void* data;
  int64_t page_stride, head_stride, stride;
};

struct Attention {
  int64_t chunks, slot_count, slot_pages, page_count, page, heads, kv_heads, head_dim, row_stride, head_stride, dtype;
  double scale;                                // of the scores, times log2(e)
  const int64_t *starts, *cu_seqlens, *slots;  // [chunks], [chunks + 1], [chunks]
  const int32_t* page_table;                   // [slot_count, slot_pages]
  const void* q;                               // [tokens, heads, head_dim]
  Cache k, v;
  void* out;                                   // [tokens, heads, head_dim]
};

struct Unit {
  int64_t chunk, kv, first, end;  // tokens, counted from the chunk's first
};

// Keys or values of one slot and head, for products with rows of type X: float32, or bfloat16 in pairs of inputs.
template <class T, class X>
struct Keys {
  const Attention& p;
  const Cache& cache;
  int64_t slot, head;

  const T* at(int64_t key) const {
    const int64_t page = p.page_table[slot * p.slot_pages + key / p.page];
    return (const T*)cache.data + page * cache.page_stride + head * cache.head_stride + key % p.page * cache.stride;
  }

  // The keys of a block as outputs: panels [BLOCK / WIDTH, head_dim / inputs per word, WIDTH]. Missing ones are zero.
  void as_outputs(int64_t first, int64_t count, uint32_t* to, std::vector<float>& row) const {
    constexpr int PER_WORD = std::is_same_v<X, float> ? 1 : 2;
    const int64_t steps = p.head_dim / PER_WORD;
    for (int64_t j = 0; j < (count + WIDTH - 1) / WIDTH * WIDTH; ++j) {
      uint32_t* column = to + j / WIDTH * steps * WIDTH + j % WIDTH;
      const uint32_t* words = (const uint32_t*)row.data();
      if (j >= count) {
        for (int64_t s = 0; s < steps; ++s) column[s * WIDTH] = 0;
        continue;
      }
      if constexpr (PER_WORD == 1) {
        to_float(at(first + j), row.data(), p.head_dim);
      } else {
        words = (const uint32_t*)at(first + j);
      }
      for (int64_t s = 0; s < steps; ++s) column[s * WIDTH] = words[s];
    }
  }

  // The values of a block as inputs: panels [head_dim / WIDTH, BLOCK / inputs per word, WIDTH], filled up with zeros.
  void as_inputs(int64_t first, int64_t count, uint32_t* to, std::vector<float>& row) const {
    const int64_t panels = (p.head_dim + WIDTH - 1) / WIDTH;
    if constexpr (std::is_same_v<X, float>) {
      for (int64_t j = 0; j < BLOCK; ++j) {
        if (j < count) to_float(at(first + j), row.data(), p.head_dim);
        if (j >= count) std::fill(row.begin(), row.end(), 0.0f);
        for (int64_t n = 0; n < panels; ++n)
          std::memcpy(to + (n * BLOCK + j) * WIDTH, row.data() + n * WIDTH, WIDTH * sizeof(float));
      }
    } else {
      for (int64_t j = 0; j < BLOCK; j += 2) {
        const T *even = j < count ? at(first + j) : nullptr, *odd = j + 1 < count ? at(first + j + 1) : nullptr;
        for (int64_t c = 0; c < panels * WIDTH; c += W) {
          halves low = {}, high = {};
          if (even && c < p.head_dim) std::memcpy(&low, even + c, sizeof low);
          if (odd && c < p.head_dim) std::memcpy(&high, odd + c, sizeof high);
          const uvec words = __builtin_convertvector(low, uvec) | __builtin_convertvector(high, uvec) << 16;
          std::memcpy(to + (c / WIDTH * (BLOCK / 2) + j / 2) * WIDTH + c % WIDTH, &words, sizeof words);
        }
      }
    }
  }
};

// What one thread works with.
template <class X>
struct Buffers {
  std::vector<uint32_t> keys, values;
  std::vector<float> row, scores, totals, maxima, sums;
  std::vector<X> q, weights;
};

template <class T, class X>
void attend(const Attention& p, const Unit& unit, Buffers<X>& b) {
  constexpr Kind kind = std::is_same_v<X, float> ? F32 : BF16;
  constexpr int PER_WORD = inputs_per_word(kind);
  const int64_t group = p.heads / p.kv_heads, rows = (unit.end - unit.first) * group, d = p.head_dim;
  const int64_t panels = (d + WIDTH - 1) / WIDTH, start = p.starts[unit.chunk], token = p.cu_seqlens[unit.chunk];
  b.keys.resize(BLOCK * d), b.values.resize(panels * WIDTH * BLOCK), b.row.assign(panels * WIDTH, 0.0f);
  b.scores.resize(TILE * BLOCK), b.weights.resize(TILE * BLOCK), b.q.resize(rows * d);
  b.totals.assign(rows * panels * WIDTH, 0.0f), b.maxima.assign(rows, LOWEST), b.sums.assign(rows * W, 0.0f);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t t = token + unit.first + r / group, head = unit.kv * group + r % group;
    const T* from = (const T*)p.q + t * p.row_stride + head * p.head_stride;
    if constexpr (std::is_same_v<X, T>) {
      std::memcpy(&b.q[r * d], from, d * sizeof(T));
    } else {
      to_float(from, &b.q[r * d], d);
    }
  }
  const Keys<T, X> k{p, p.k, p.slots[unit.chunk], unit.kv}, v{p, p.v, p.slots[unit.chunk], unit.kv};
  ivec number;
  for (int lane = 0; lane < W; ++lane) number[lane] = lane;
  for (int64_t first = 0; first < start + unit.end; first += BLOCK) {
    const int64_t count = std::min<int64_t>(BLOCK, start + unit.end - first), key_panels = (count + WIDTH - 1) / WIDTH;
    k.as_outputs(first, count, b.keys.data(), b.row);
    v.as_inputs(first, count, b.values.data(), b.row);
    for (int64_t r0 = 0; r0 < rows; r0 += TILE) {
      const int64_t some = std::min<int64_t>(TILE, rows - r0);
      if (first > start + unit.first + (r0 + some - 1) / group) continue;  // after the last row's own key
      float* scores = b.scores.data();  // [key_panels, TILE, WIDTH]
      std::fill(scores, scores + key_panels * TILE * WIDTH, 0.0f);
      for (int64_t n = 0; n < key_panels; ++n) {
        const uint32_t* panel = &b.keys[n * d / PER_WORD * WIDTH];
        Tile<kind, X>{&b.q[r0 * d], nullptr, panel, panel, nullptr, nullptr, d, 0, d / PER_WORD, 0, 0, 0,
                      scores + n * TILE * WIDTH}.template run<1>(some);
      }
      for (int64_t r = 0; r < some; ++r) {
        const int64_t own = start + unit.first + (r0 + r) / group - first;  // the row's own key, in this block
        const int32_t seen = (int32_t)std::min<int64_t>(own + 1, count);
        vec row[BLOCK / W], most = splat(b.maxima[r0 + r]);
        for (int j = 0; j < key_panels * WIDTH; j += W) {
          const float* from = scores + (j / WIDTH * TILE + r) * WIDTH + j % WIDTH;
          row[j / W] = number + j < seen ? load(from) * (float)p.scale : splat(LOWEST);
          most = max(row[j / W], most);
        }
        const float maximum = highest(most);
        const vec rescale = exp2_nonpositive(splat(b.maxima[r0 + r] - maximum));
        vec total = load(&b.sums[(r0 + r) * W]) * rescale;
        for (int j = 0; j < key_panels * WIDTH; j += W) {
          const vec x = row[j / W] - maximum, weight = x <= -126.0f ? vec{} : exp2_nonpositive(x);
          total += weight;
          store(&b.weights[r * BLOCK + j], weight);
        }
        store(&b.sums[(r0 + r) * W], total);
        b.maxima[r0 + r] = maximum;
        for (int64_t c = 0; c < panels * WIDTH; c += W) {
          float* at = &b.totals[((r0 * panels) + (c / WIDTH * some + r)) * WIDTH + c % WIDTH];
          store(at, load(at) * rescale);
        }
      }
      for (int64_t n = 0; n < panels; ++n) {
        const uint32_t* panel = &b.values[n * BLOCK / PER_WORD * WIDTH];
        Tile<kind, X>{b.weights.data(), nullptr, panel, panel, nullptr, nullptr, BLOCK, 0,
                      key_panels * WIDTH / PER_WORD, 0, 0, 0,
                      &b.totals[(r0 * panels + n * some) * WIDTH]}.template run<1>(some);
      }
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t r0 = r / TILE * TILE, some = std::min<int64_t>(TILE, rows - r0);
    const int64_t t = token + unit.first + r / group, head = unit.kv * group + r % group;
    float* row = b.row.data();
    for (int64_t c = 0; c < panels * WIDTH; c += W)
      store(row + c, load(&b.totals[(r0 * panels + c / WIDTH * some + r - r0) * WIDTH + c % WIDTH]) / sum(load(&b.sums[r * W])));
    from_float(row, (T*)p.out + (t * p.heads + head) * d, d);
  }
}

template <class T>
void prefill(const Attention& p) {
  using X = std::conditional_t<std::is_same_v<T, bf16>, Halves, float>;
  std::vector<Unit> units;
  for (int64_t chunk = 0; chunk < p.chunks; ++chunk) {
    const int64_t length = p.cu_seqlens[chunk + 1] - p.cu_seqlens[chunk];
    const int64_t begin = p.cu_seqlens[chunk] * p.heads * p.head_dim;
    if (p.slots[chunk] < 0 && length) std::memset((T*)p.out + begin, 0, length * p.heads * p.head_dim * sizeof(T));
    for (int64_t first = 0; p.slots[chunk] >= 0 && first < length; first += PART)
      for (int64_t kv = 0; kv < p.kv_heads; ++kv) units.push_back({chunk, kv, first, std::min(first + PART, length)});
  }
  // the largest first, so that threads end together
  std::stable_sort(units.begin(), units.end(), [&](const Unit& a, const Unit& b) {
    return p.starts[a.chunk] + a.end > p.starts[b.chunk] + b.end;
  });
#pragma omp parallel
  {
    static thread_local Buffers<X> buffers;
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < units.size(); ++i) attend<T, X>(p, units[i], buffers);
  }
}

bool exists(const Attention& p, int64_t chunk) {
  const int64_t slot = p.slots[chunk], length = p.cu_seqlens[chunk + 1] - p.cu_seqlens[chunk];
  if (slot < 0) return true;
  const int64_t room = p.slot_pages * p.page;
  if (slot >= p.slot_count || p.starts[chunk] < 0 || p.starts[chunk] > room - length) return false;
  const int32_t* pages = p.page_table + slot * p.slot_pages;
  return std::all_of(pages, pages + (length ? (p.starts[chunk] + length + p.page - 1) / p.page : 0),
                     [&](int32_t page) { return page >= 0 && page < p.page_count; });
}

}  // namespace

// Returns -1, or the first chunk whose slot, length or pages are out of range, in which case nothing was written.
extern "C" int64_t m1_prefill_attention(const Attention* p) {
  for (int64_t i = 0; i < p->chunks; ++i)
    if (!exists(*p, i)) return i;
  with_type(p->dtype, [&](auto t) { prefill<decltype(t)>(*p); });
  return -1;
}
