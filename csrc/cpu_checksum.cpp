// The checksum of block files: zo_offload/tiers/checksum.py says what it is and has the reference, equal bit for bit.
// Integer arithmetic only, so every variant gives the same bits.
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { CHUNK_WORDS = 1024, PAIRS = CHUNK_WORDS / 2 };

static inline uint64_t mix(uint64_t x) {  // splitmix64's finaliser: a bijection
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// Two words are read as one of 64 bits, so each half has a table of 64-bit weights: the vector multiply takes the low
// half of each 64-bit lane, and nothing has to be widened.
struct Weights {
  alignas(64) uint64_t low[PAIRS], high[PAIRS];
  Weights() {
    for (int i = 0; i < PAIRS; i++) low[i] = of(2 * i), high[i] = of(2 * i + 1);
  }
  static uint64_t of(int i) { return (uint32_t)(mix(0x9e3779b97f4a7c15u * (uint64_t)(i + 1)) >> 32) | 1; }
};

static uint64_t chunk_plain(const unsigned char* data, const Weights& w) {
  uint64_t sum = 0;
  for (int i = 0; i < PAIRS; i++) {
    uint64_t pair;
    memcpy(&pair, data + 8 * i, 8);
    sum += (uint32_t)pair * w.low[i] + (pair >> 32) * w.high[i];
  }
  return sum;
}

typedef uint64_t (*ChunkFn)(const unsigned char*, const Weights&);

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

__attribute__((target("avx2"))) static uint64_t chunk_avx2(const unsigned char* data, const Weights& w) {
  __m256i a = _mm256_setzero_si256(), b = a;
  for (int i = 0; i < PAIRS; i += 4) {
    const __m256i pair = _mm256_loadu_si256((const __m256i*)(data + 8 * i));
    a = _mm256_add_epi64(a, _mm256_mul_epu32(pair, *(const __m256i*)(w.low + i)));
    b = _mm256_add_epi64(b, _mm256_mul_epu32(_mm256_srli_epi64(pair, 32), *(const __m256i*)(w.high + i)));
  }
  alignas(32) uint64_t part[4];
  _mm256_store_si256((__m256i*)part, _mm256_add_epi64(a, b));
  return part[0] + part[1] + part[2] + part[3];
}

__attribute__((target("avx512f"))) static uint64_t chunk_avx512(const unsigned char* data, const Weights& w) {
  __m512i a = _mm512_setzero_si512(), b = a;
  for (int i = 0; i < PAIRS; i += 8) {
    const __m512i pair = _mm512_loadu_si512(data + 8 * i);
    a = _mm512_add_epi64(a, _mm512_mul_epu32(pair, _mm512_load_si512(w.low + i)));
    b = _mm512_add_epi64(b, _mm512_mul_epu32(_mm512_srli_epi64(pair, 32), _mm512_load_si512(w.high + i)));
  }
  return (uint64_t)_mm512_reduce_add_epi64(_mm512_add_epi64(a, b));
}

static ChunkFn choose() {
  if (__builtin_cpu_supports("avx512f")) return chunk_avx512;
  return __builtin_cpu_supports("avx2") ? chunk_avx2 : chunk_plain;
}
#else
static ChunkFn choose() { return chunk_plain; }
#endif

extern "C" __attribute__((visibility("default"))) uint64_t zo_cpu_checksum(const unsigned char* data, uint64_t nbytes,
                                                                           uint64_t offset) {
  static const Weights weights;
  static const ChunkFn whole_chunk = choose();
  uint64_t total = 0;
  uint64_t done = 0;
  for (; done + 4 * CHUNK_WORDS <= nbytes; done += 4 * CHUNK_WORDS)
    total += mix(whole_chunk(data + done, weights) ^ (offset + done + 1) * 0x9e3779b97f4a7c15u);
  if (done < nbytes) {
    alignas(64) unsigned char last[4 * CHUNK_WORDS] = {0};
    memcpy(last, data + done, nbytes - done);
    total += mix(whole_chunk(last, weights) ^ (offset + done + 1) * 0x9e3779b97f4a7c15u);
  }
  return total;
}
