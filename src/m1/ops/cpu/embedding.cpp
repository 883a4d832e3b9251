// Copies rows of a table.

#include "vector.h"

namespace {

struct Embedding {
  int64_t rows, count, bytes;  // of the tokens, of the table, of a row
  const char* table;           // [count, bytes]
  const int64_t* tokens;       // [rows]
  char* out;                   // [rows, bytes]
};

}  // namespace

// Returns -1, or the first row whose token is out of range, in which case nothing was written.
extern "C" int64_t m1_embedding(const Embedding* p) {
  for (int64_t i = 0; i < p->rows; ++i)
    if (p->tokens[i] < 0 || p->tokens[i] >= p->count) return i;
  for (int64_t i = 0; p->bytes && i < p->rows; ++i)
    std::memcpy(p->out + i * p->bytes, p->table + p->tokens[i] * p->bytes, p->bytes);
  return -1;
}
