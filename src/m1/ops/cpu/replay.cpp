// Runs recorded calls of kernels one after another (ops/calls.py).

#include <cstdint>

namespace {

struct Call {
  int64_t (*kernel)(const void*);
  const void* fields;
};

struct Replay {
  int64_t count;
  const Call* calls;
};

}  // namespace

// Returns -1, or what the first kernel returns that finds something out of range. The later ones don't run.
extern "C" int64_t m1_replay(const Replay* p) {
  for (int64_t i = 0; i < p->count; ++i) {
    const int64_t row = p->calls[i].kernel(p->calls[i].fields);
    if (row >= 0) return row;
  }
  return -1;
}
