// The product of a tile of rows with panels of weights, in registers.
//
// A panel has WIDTH outputs. A word of 32 bits has one or several inputs of an output, and a step is the WIDTH words of
// the same inputs. So a panel is read once and in order. Where the processor multiplies bfloat16 or bytes, rows may be
// in that type, too; elsewhere rows are float32.

#pragma once

#include <algorithm>
#include <type_traits>

#include "vector.h"

namespace m1 {

constexpr int WIDTH = 2 * W;                         // outputs per panel
constexpr int TILE = W == 16 ? 12 : W == 8 ? 6 : 4;  // rows whose sums fit in registers beside the operands
constexpr int GROUP = 32;                            // inputs of a quantized weight that share a scale

enum Kind : int64_t { F32, BF16, F16, Q8, Q4 };      // of weights; the first three as in `with_type`

constexpr int inputs_per_word(Kind kind) { return kind == F32 ? 1 : kind == Q8 ? 4 : kind == Q4 ? 8 : 2; }
constexpr bool quantized(Kind kind) { return kind == Q8 || kind == Q4; }

// A row for quantized weights has one of these per GROUP inputs.
struct RowGroup {
  float scale, sum;  // sum: of the rounded inputs
};

// What the processor multiplies: bfloat16, and bytes, or float32 in place of them.
#if defined(__AVX512BF16__)
using Halves = bf16;
#else
using Halves = float;
#endif
#if defined(__AVX512VNNI__) || (defined(__AVXVNNI__) && !defined(__AVX512F__))
using Bytes = int8_t;
#else
using Bytes = float;
#endif

// The sum of products of W outputs with a row, for a kind of weight, `add`ed word by word.
template <Kind kind, class X>
struct Sum;

// Rows in float32. Input i of a word is widened to float.
template <Kind kind>
struct Sum<kind, float> {
  vec total = {};

  static vec widen(uvec word, int i) {
    if constexpr (kind == F32) return (vec)word;
    if constexpr (kind == BF16) return (vec)(i ? word & 0xffff0000u : word << 16);
    if constexpr (kind == F16) return m1::widen(__builtin_convertvector(word >> 16 * i, halves));
    if constexpr (kind == Q8) return __builtin_convertvector((ivec)(word >> 8 * i & 0xffu), vec);
    if constexpr (kind == Q4) return __builtin_convertvector((ivec)(word >> (8 * (i % 4) + i / 4 * 4) & 0xfu), vec);
  }

  void add(uvec word, const float* x) {
    for (int i = 0; i < inputs_per_word(kind); ++i)
      total += x[kind == Q4 ? i % 4 + i / 4 * (GROUP / 2) : i] * widen(word, i);
  }

  vec value() const { return total; }
};

inline uvec load_words(const uint32_t* p) {
  uvec words;
  std::memcpy(&words, p, sizeof words);
  return words;
}

inline uint32_t word_at(const void* p) {
  uint32_t word;
  std::memcpy(&word, p, sizeof word);
  return word;
}

#if defined(__AVX512BF16__)
template <>
struct Sum<BF16, bf16> {
  vec total = {};

  void add(uvec word, const bf16* x) {
    total = (vec)_mm512_dpbf16_ps((__m512)total, (__m512bh)word, (__m512bh)(uvec{} + word_at(x)));
  }

  vec value() const { return total; }
};
#endif

// Adds the products of 4 unsigned bytes of each word with 4 signed bytes.
inline ivec multiply_bytes(ivec total, uvec word, uint32_t x) {
#if defined(__AVX512VNNI__)
  return (ivec)_mm512_dpbusd_epi32((__m512i)total, (__m512i)word, (__m512i)(uvec{} + x));
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
  return (ivec)_mm256_dpbusd_avx_epi32((__m256i)total, (__m256i)word, (__m256i)(uvec{} + x));
#else
  return total;
#endif
}

template <>
struct Sum<Q8, int8_t> {
  ivec total = {};

  void add(uvec word, const int8_t* x) { total = multiply_bytes(total, word, word_at(x)); }
  vec value() const { return __builtin_convertvector(total, vec); }
};

template <>
struct Sum<Q4, int8_t> {
  ivec total = {};

  void add(uvec word, const int8_t* x) {
    total = multiply_bytes(total, word & 0x0f0f0f0fu, word_at(x));
    total = multiply_bytes(total, word >> 4 & 0x0f0f0f0fu, word_at(x + GROUP / 2));
  }
  vec value() const { return __builtin_convertvector(total, vec); }
};

constexpr int most_rows(Kind kind, int panels) {
  return panels == 4 ? 1 : panels == 2 ? 3 : quantized(kind) ? std::min(TILE, 6) : TILE;  // sums of groups need registers
}

// The product of a tile of rows with PANELS panels, over `steps` steps.
template <Kind kind, class X>
struct Tile {
  const X* x;                     // rows `stride` elements apart
  const RowGroup* row_groups;     // of each row, `groups` apart
  const uint32_t *weight, *ahead; // ahead: weights to prefetch, `pace` words per step
  const f16 *scales, *minima;     // of this part of the panel
  int64_t stride, groups, steps, panel, panel_scales, pace;  // panel: words from one panel to the next
  float* sums;                    // [rows, PANELS, WIDTH], to which the products are added

  template <int ROWS, int PANELS>
  void multiply() const {
    constexpr int PER_WORD = inputs_per_word(kind), RUN = GROUP / PER_WORD;
    Sum<kind, X> sum[ROWS][PANELS][2];
    const auto step = [&](int64_t s) {
      // the words of Q4 have inputs from both halves of their group
      const int64_t input = kind == Q4 ? s / RUN * GROUP + s % RUN * 4 : s * PER_WORD;
      if constexpr (PANELS == 1) __builtin_prefetch(ahead + s * pace);
      for (int p = 0; p < PANELS; ++p) {
        const uint32_t* words = weight + p * panel + s * WIDTH;
        const uvec first = load_words(words), second = load_words(words + W);
        for (int r = 0; r < ROWS; ++r) {
          sum[r][p][0].add(first, x + r * stride + input);
          sum[r][p][1].add(second, x + r * stride + input);
        }
      }
    };
    vec total[ROWS][PANELS][2] = {};
    if constexpr (quantized(kind)) {
      for (int64_t group = 0; group < steps / RUN; ++group) {
        for (int r = 0; r < ROWS; ++r)
          for (int p = 0; p < PANELS; ++p)
            for (int i = 0; i < 2; ++i) sum[r][p][i] = {};
        for (int64_t s = 0; s < RUN; ++s) step(group * RUN + s);
        for (int p = 0; p < PANELS; ++p)
          for (int i = 0; i < 2; ++i) {
            const int64_t at = p * panel_scales + group * WIDTH + i * W;
            const vec scale = load(scales + at), minimum = kind == Q4 ? load(minima + at) : -128.0f * scale;
            for (int r = 0; r < ROWS; ++r) {
              const RowGroup& of_row = row_groups[r * groups + group];
              total[r][p][i] += of_row.scale * scale * sum[r][p][i].value() + of_row.sum * minimum;
            }
          }
      }
    } else {
      for (int64_t s = 0; s < steps; ++s) step(s);
      for (int r = 0; r < ROWS; ++r)
        for (int p = 0; p < PANELS; ++p)
          for (int i = 0; i < 2; ++i) total[r][p][i] = sum[r][p][i].total;
    }
    for (int r = 0; r < ROWS; ++r)
      for (int p = 0; p < PANELS; ++p)
        for (int i = 0; i < 2; ++i) {
          float* to = sums + (r * PANELS + p) * WIDTH + i * W;
          store(to, load(to) + total[r][p][i]);
        }
  }

  template <int PANELS, int ROWS = most_rows(kind, PANELS)>
  void run(int64_t rows) const {
    if constexpr (ROWS > 1)
      if (rows < ROWS) return run<PANELS, ROWS - 1>(rows);
    multiply<ROWS, PANELS>();
  }
};

}  // namespace m1
