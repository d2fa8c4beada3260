// The checksum of block files: zo_offload/checksum.py says what it is and has the reference, equal bit for bit.
// Integer arithmetic only, so any variant the compiler makes gives the same bits.
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { CHUNK_WORDS = 1024 };

static inline uint64_t mix(uint64_t x) {  // splitmix64's finaliser: a bijection
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

struct Weights {
  alignas(64) uint32_t of[CHUNK_WORDS];
  Weights() {
    for (int i = 0; i < CHUNK_WORDS; i++) of[i] = (uint32_t)(mix(0x9e3779b97f4a7c15u * (uint64_t)(i + 1)) >> 32) | 1;
  }
};

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CLONES
#endif

CLONES static uint64_t whole_chunk(const unsigned char* data, const uint32_t* weights) {
  uint64_t sum = 0;
  for (int i = 0; i < CHUNK_WORDS; i++) {
    uint32_t word;
    memcpy(&word, data + 4 * i, 4);
    sum += (uint64_t)word * weights[i];
  }
  return sum;
}

extern "C" __attribute__((visibility("default"))) uint64_t zo_cpu_checksum(const unsigned char* data, uint64_t nbytes,
                                                                           uint64_t offset) {
  static const Weights weights;
  uint64_t total = 0;
  uint64_t done = 0;
  for (; done + 4 * CHUNK_WORDS <= nbytes; done += 4 * CHUNK_WORDS)
    total += mix(whole_chunk(data + done, weights.of) ^ (offset + done + 1) * 0x9e3779b97f4a7c15u);
  if (done < nbytes) {
    uint64_t sum = 0;
    for (uint64_t i = 0; done + 4 * i < nbytes; i++) {
      uint32_t word = 0;
      uint64_t left = nbytes - done - 4 * i;
      memcpy(&word, data + done + 4 * i, left < 4 ? (size_t)left : 4);
      sum += (uint64_t)word * weights.of[i];
    }
    total += mix(sum ^ (offset + done + 1) * 0x9e3779b97f4a7c15u);
  }
  return total;
}
