// AVX2 + FMA + F16C kernels. Built with its own flags; cpu.cpp calls it only on a CPU that has them.
#include <immintrin.h>

#include "cpu_tile.h"

namespace {

// The rows in two halves, as far as one shuffle of eight looks: of exponents whose lower four bits are 6 to 13, which is
// a >= 2^23, and of the others, which one normal in 256 needs. Both by the lower three bits.
struct Halves {
  zo_u32 wide[4][8], tail[4][8];
};
constexpr Halves halves() {
  Halves h = {};
  for (int k = 0; k < 4; ++k)
    for (int row = 0; row < 16; ++row) (row >= 6 && row < 14 ? h.wide : h.tail)[k][row & 7] = ROWS.c[k][row];
  return h;
}
alignas(32) constexpr Halves HALVES = halves();

struct Avx2Words {  // what formats.h needs to widen 8-bit floats, in 16-bit lanes
  typedef __m128i U;
  static ZO_HD U u(zo_u32 x) { return _mm_set1_epi16((short)x); }
  static ZO_HD U or_(U a, U b) { return _mm_or_si128(a, b); }
  static ZO_HD U and_(U a, U b) { return _mm_and_si128(a, b); }
  static ZO_HD U add_u(U a, U b) { return _mm_add_epi16(a, b); }
  template <int N> static ZO_HD U shl(U a) { return _mm_slli_epi16(a, N); }
  static ZO_HD U load8_signed(const zo_u8* p) { return _mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i*)p)); }
  static ZO_HD __m256 half_value(U codes) { return _mm256_cvtph_ps(codes); }
};

struct Avx2 {
  typedef Avx2Words Words;
  typedef __m256i U, Word;
  typedef __m256 F;
  enum { WIDTH = 8, BLOCKS = 4, GROUPS = 4, REGISTERS = 16 };
  static ZO_HD U u(zo_u32 x) { return _mm256_set1_epi32((int)x); }
  static ZO_HD F f(float x) { return _mm256_set1_ps(x); }
  static ZO_HD U or_(U a, U b) { return _mm256_or_si256(a, b); }
  static ZO_HD U and_(U a, U b) { return _mm256_and_si256(a, b); }
  static ZO_HD U xor_(U a, U b) { return _mm256_xor_si256(a, b); }
  static ZO_HD U and_or(U a, U mask, U bits) { return or_(and_(a, mask), bits); }
  static ZO_HD U xor_and(U a, U b, U mask) { return xor_(a, and_(b, mask)); }
  static ZO_HD U add_u(U a, U b) { return _mm256_add_epi32(a, b); }
  static ZO_HD U sub_u(U a, U b) { return _mm256_sub_epi32(a, b); }
  template <int N> static ZO_HD U shl(U a) { return _mm256_slli_epi32(a, N); }
  template <int N> static ZO_HD U shr(U a) { return _mm256_srli_epi32(a, N); }
  static ZO_HD U select_less(U a, U b, U x, U y) { return _mm256_blendv_epi8(y, x, _mm256_cmpgt_epi32(b, a)); }
  static ZO_HD U most_u(U a, U b) { return _mm256_max_epi32(a, b); }
  static ZO_HD U select_greater(F a, F b, U x, U y) {
    return bits(_mm256_blendv_ps(value(y), value(x), _mm256_cmp_ps(a, b, _CMP_GT_OQ)));
  }
  static ZO_HD F clamp(F x, float low, float high) { return _mm256_min_ps(_mm256_max_ps(x, f(low)), f(high)); }
  static ZO_HD U select_nan(F v, U x, U y) {
    return bits(_mm256_blendv_ps(value(y), value(x), _mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
  }
  static ZO_HD F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static ZO_HD F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static ZO_HD F add(F a, F b) { return _mm256_add_ps(a, b); }
  static ZO_HD F sqrt(F a) { return _mm256_sqrt_ps(a); }
  static ZO_HD F to_float(U a) { return _mm256_cvtepi32_ps(a); }
  static ZO_HD U truncate(F a) { return _mm256_cvttps_epi32(a); }
  static ZO_HD U bits(F a) { return _mm256_castps_si256(a); }
  static ZO_HD F value(U a) { return _mm256_castsi256_ps(a); }

  static ZO_HD U u64(zo_u64 x) { return _mm256_set1_epi64x((zo_i64)x); }
  static ZO_HD Word word(zo_u64 x) { return u64(x); }
  static ZO_HD U add64(U a, U b) { return _mm256_add_epi64(a, b); }
  static ZO_HD U mul64(Word a, Word b) { return _mm256_mul_epu32(a, b); }
  static ZO_HD Word lower(U a) { return a; }
  static ZO_HD Word upper(U a) { return _mm256_srli_epi64(a, 32); }
  static ZO_HD U lift(Word a) { return _mm256_slli_epi64(a, 32); }
  static ZO_HD U xor3(U a, U b, U c) { return xor_(a, xor_(b, c)); }
  // block order of the 64-bit lanes: what unpacklo takes from each 128 bits comes first in memory
  static ZO_HD U lanes() { return _mm256_setr_epi64x(0, 2, 1, 3); }
  static ZO_HD U merge(Word low, Word high) { return _mm256_blend_epi32(low, _mm256_slli_epi64(high, 32), 0xAA); }
  static ZO_HD F zip_low(F a, F b) { return _mm256_unpacklo_ps(a, b); }
  static ZO_HD F zip_high(F a, F b) { return _mm256_unpackhi_ps(a, b); }
  static ZO_HD U unpack64_low(U a, U b) { return _mm256_unpacklo_epi64(a, b); }
  static ZO_HD U unpack64_high(U a, U b) { return _mm256_unpackhi_epi64(a, b); }
  // 128 bits of a, 128 bits of b, and so on
  static ZO_HD F zip128_low(F a, F b) { return _mm256_permute2f128_ps(a, b, 0x20); }
  static ZO_HD F zip128_high(F a, F b) { return _mm256_permute2f128_ps(a, b, 0x31); }
  static ZO_HD F gaussian_of(U s, F a, const zo_u32 (&rows)[4][8]) {
    const U row = shr<23>(bits(a));  // the instruction looks at the lower three bits
    return zo_gaussian<Avx2>(s, a, [&](int k) {
      return value(_mm256_permutevar8x32_epi32(_mm256_load_si256((const U*)rows[k]), row));
    });
  }
  static ZO_HD F gaussian(U s) {
    const F a = zo_gaussian_argument<Avx2>(s), z = gaussian_of(s, a, HALVES.wide);
    const F tail = _mm256_cmp_ps(a, f(8388608.0f), _CMP_LT_OQ);
    if (__builtin_expect(_mm256_movemask_ps(tail) == 0, 1)) return z;  // but for one vector in 32
    return _mm256_blendv_ps(z, gaussian_of(s, a, HALVES.tail), tail);
  }
  static ZO_HD void store_blocks(zo_u32* out, Word c0, Word c1, Word c2, Word c3) {
    U a = merge(c0, c1), b = merge(c2, c3);
    _mm256_storeu_si256((__m256i*)out, _mm256_unpacklo_epi64(a, b));
    _mm256_storeu_si256((__m256i*)(out + 8), _mm256_unpackhi_epi64(a, b));
  }

  static ZO_HD F load(const float* p) { return _mm256_loadu_ps(p); }
  static ZO_HD void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static ZO_HD U load_bits(const void* p) { return _mm256_loadu_si256((const U*)p); }
  static ZO_HD void store_bits(void* p, U x) { _mm256_storeu_si256((__m256i*)p, x); }
  static ZO_HD void store_past_cache(void* p, U x) { _mm256_stream_si256((__m256i*)p, x); }
  static ZO_HD U load16(const void* p) { return _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)); }
  static ZO_HD U load8(const zo_u8* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
  static ZO_HD void store8(zo_u8* p, U x) {
    const U low = and_(x, u(0xff));
    const __m128i half = _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
    _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(half, half));
  }
  // elements i.. of a plane of half-bytes
  static ZO_HD U load4(const zo_u8* p, int i) {
    zo_u32 codes;
    __builtin_memcpy(&codes, p + i / 2, 4);
    return and_(_mm256_srlv_epi32(u(codes), _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28)), u(15));
  }
  static ZO_HD F lookup(const float* table, U index) {
    const F low = _mm256_permutevar8x32_ps(load(table), index), high = _mm256_permutevar8x32_ps(load(table + 8), index);
    return _mm256_blendv_ps(low, high, value(shl<28>(index)));
  }
  static ZO_HD U pack16(U a, U b) { return _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xD8); }
  static ZO_HD U pack_upper16(U a, U b) { return pack16(shr<16>(a), shr<16>(b)); }
  static ZO_HD F half_value(U codes) { return _mm256_cvtph_ps(_mm256_castsi256_si128(pack16(codes, codes))); }
  static ZO_HD U half_round(F x) {
    U codes = _mm256_cvtepu16_epi32(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    return select_nan(x, u(0x7e00), codes);
  }
  static ZO_HD F add_signed(F w, F scale, const zo_u32* signs, int i) {
    const U shift = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
    U sign = _mm256_sllv_epi32(u((zo_u32)((const zo_u8*)signs)[i / 8]), shift);
    return zo_add_sign<Avx2>(w, scale, and_(sign, u(0x80000000u)));
  }
};

}  // namespace

extern "C" zo_kernels zo_kernels_avx2(void) { return kernels<Avx2>(); }
