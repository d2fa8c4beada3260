// AVX-512 (F, BW, DQ, VL) kernels. Built with its own flags; cpu.cpp calls it only on a CPU that has them.
#include <immintrin.h>

#include "cpu_tile.h"

namespace {

struct Avx512Words {  // what formats.h needs to widen 8-bit floats, in 16-bit lanes
  typedef __m256i U;
  static ZO_HD U u(zo_u32 x) { return _mm256_set1_epi16((short)x); }
  static ZO_HD U or_(U a, U b) { return _mm256_or_si256(a, b); }
  static ZO_HD U and_(U a, U b) { return _mm256_and_si256(a, b); }
  static ZO_HD U add_u(U a, U b) { return _mm256_add_epi16(a, b); }
  template <int N> static ZO_HD U shl(U a) { return _mm256_slli_epi16(a, N); }
  static ZO_HD U load8_signed(const zo_u8* p) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p));
  }
  static ZO_HD __m512 half_value(U codes) { return _mm512_cvtph_ps(codes); }
};

struct Avx512 {
  typedef Avx512Words Words;
  typedef __m512i U, Word;
  typedef __m512 F;
  enum { WIDTH = 16, BLOCKS = 8, GROUPS = 4, REGISTERS = 32 };
  static ZO_HD U u(zo_u32 x) { return _mm512_set1_epi32((int)x); }
  static ZO_HD F f(float x) { return _mm512_set1_ps(x); }
  static ZO_HD U or_(U a, U b) { return _mm512_or_si512(a, b); }
  static ZO_HD U and_(U a, U b) { return _mm512_and_si512(a, b); }
  static ZO_HD U xor_(U a, U b) { return _mm512_xor_si512(a, b); }
  static ZO_HD U and_or(U a, U mask, U bits) { return _mm512_ternarylogic_epi32(a, mask, bits, 0xEA); }
  static ZO_HD U xor_and(U a, U b, U mask) { return _mm512_ternarylogic_epi32(a, b, mask, 0x78); }
  static ZO_HD U add_u(U a, U b) { return _mm512_add_epi32(a, b); }
  static ZO_HD U sub_u(U a, U b) { return _mm512_sub_epi32(a, b); }
  template <int N> static ZO_HD U shl(U a) { return _mm512_slli_epi32(a, N); }
  template <int N> static ZO_HD U shr(U a) { return _mm512_srli_epi32(a, N); }
  static ZO_HD U select_less(U a, U b, U x, U y) { return _mm512_mask_mov_epi32(y, _mm512_cmplt_epi32_mask(a, b), x); }
  static ZO_HD U most_u(U a, U b) { return _mm512_max_epi32(a, b); }
  static ZO_HD U select_greater(F a, F b, U x, U y) {
    return _mm512_mask_mov_epi32(y, _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), x);
  }
  static ZO_HD F clamp(F x, float low, float high) { return _mm512_min_ps(_mm512_max_ps(x, f(low)), f(high)); }
  static ZO_HD U select_nan(F v, U x, U y) {
    return _mm512_mask_mov_epi32(y, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), x);
  }
  static ZO_HD F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static ZO_HD F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static ZO_HD F add(F a, F b) { return _mm512_add_ps(a, b); }
  static ZO_HD F sqrt(F a) { return _mm512_sqrt_ps(a); }
  static ZO_HD F to_float(U a) { return _mm512_cvtepi32_ps(a); }
  static ZO_HD U truncate(F a) { return _mm512_cvttps_epi32(a); }
  static ZO_HD U bits(F a) { return _mm512_castps_si512(a); }
  static ZO_HD F value(U a) { return _mm512_castsi512_ps(a); }

  static ZO_HD U u64(zo_u64 x) { return _mm512_set1_epi64((zo_i64)x); }
  static ZO_HD Word word(zo_u64 x) { return u64(x); }
  static ZO_HD U add64(U a, U b) { return _mm512_add_epi64(a, b); }
  static ZO_HD U mul64(Word a, Word b) { return _mm512_mul_epu32(a, b); }
  static ZO_HD Word lower(U a) { return a; }
  static ZO_HD Word upper(U a) { return _mm512_srli_epi64(a, 32); }
  static ZO_HD U lift(Word a) { return _mm512_slli_epi64(a, 32); }
  static ZO_HD U xor3(U a, U b, U c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
  // block order of the 64-bit lanes: what unpacklo takes from each 128 bits comes first in memory
  static ZO_HD U lanes() { return _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7); }
  static ZO_HD U merge(Word low, Word high) { return _mm512_mask_shuffle_epi32(low, 0xAAAA, high, _MM_PERM_CCAA); }
  static ZO_HD F zip_low(F a, F b) { return _mm512_unpacklo_ps(a, b); }
  static ZO_HD F zip_high(F a, F b) { return _mm512_unpackhi_ps(a, b); }
  static ZO_HD U unpack64_low(U a, U b) { return _mm512_unpacklo_epi64(a, b); }
  static ZO_HD U unpack64_high(U a, U b) { return _mm512_unpackhi_epi64(a, b); }
  // 128 bits of a, 128 bits of b, and so on
  static ZO_HD F zip128_low(F a, F b) {
    const U order = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    return _mm512_castpd_ps(_mm512_permutex2var_pd(_mm512_castps_pd(a), order, _mm512_castps_pd(b)));
  }
  static ZO_HD F zip128_high(F a, F b) {
    const U order = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    return _mm512_castpd_ps(_mm512_permutex2var_pd(_mm512_castps_pd(a), order, _mm512_castps_pd(b)));
  }
  static ZO_HD F gaussian(U s) {
    const F a = zo_gaussian_argument<Avx512>(s);
    const U row = shr<23>(bits(a));  // the instruction looks at the lower four bits
    return zo_gaussian<Avx512>(s, a, [&](int k) {
      return value(_mm512_permutexvar_epi32(row, _mm512_load_si512(ROWS.c[k])));
    });
  }
  static ZO_HD void store_blocks(zo_u32* out, Word c0, Word c1, Word c2, Word c3) {
    U a = merge(c0, c1), b = merge(c2, c3);
    _mm512_storeu_si512(out, _mm512_unpacklo_epi64(a, b));
    _mm512_storeu_si512(out + 16, _mm512_unpackhi_epi64(a, b));
  }

  static ZO_HD F load(const float* p) { return _mm512_loadu_ps(p); }
  static ZO_HD void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static ZO_HD U load_bits(const void* p) { return _mm512_loadu_si512(p); }
  static ZO_HD void store_bits(void* p, U x) { _mm512_storeu_si512(p, x); }
  static ZO_HD void store_past_cache(void* p, U x) { _mm512_stream_si512((__m512i*)p, x); }
  static ZO_HD U load16(const void* p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)); }
  static ZO_HD U load8(const zo_u8* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
  static ZO_HD void store8(zo_u8* p, U x) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(x)); }
  // elements i.. of a plane of half-bytes
  static ZO_HD U load4(const zo_u8* p, int i) {
    zo_i64 codes;
    __builtin_memcpy(&codes, p + i / 2, 8);
    const U both = _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1),
                                            _mm512_castsi128_si512(_mm_cvtsi64_si128(codes)));
    const U shifts = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
    return and_(_mm512_srlv_epi32(both, shifts), u(15));
  }
  static ZO_HD F lookup(const float* table, U index) { return _mm512_permutexvar_ps(index, load(table)); }
  static ZO_HD U pack16(U a, U b) {
    const U even = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26, 24, 22,
                                    20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    return _mm512_permutex2var_epi16(a, even, b);
  }
  static ZO_HD U pack_upper16(U a, U b) {
    const U odd = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25, 23,
                                   21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    return _mm512_permutex2var_epi16(a, odd, b);
  }
  static ZO_HD F half_value(U codes) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(codes)); }
  static ZO_HD U half_round(F x) {
    U codes = _mm512_cvtepu16_epi32(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    return select_nan(x, u(0x7e00), codes);
  }
  static ZO_HD F add_signed(F w, F scale, const zo_u32* signs, int i) {
    zo_u16 mask;
    __builtin_memcpy(&mask, (const zo_u8*)signs + i / 8, 2);
    F flipped = value(xor_(bits(scale), u(0x80000000u)));
    return _mm512_add_ps(w, _mm512_mask_mov_ps(scale, mask, flipped));
  }
};

}  // namespace

extern "C" zo_kernels zo_kernels_avx512(void) { return kernels<Avx512>(); }
