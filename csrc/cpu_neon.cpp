// NEON kernels, for every aarch64 CPU; little-endian. A vector here is two registers: 8 elements, so that a tile's code is
// that of AVX2 and 32 registers are 16 vectors.
#include <arm_neon.h>

#include "cpu_tile.h"

namespace {

// The Gaussian's rows, coefficient k of all of them as bytes, by how many zeros are above a's highest bit: 1 to 16, less 1.
// The first eight are those of a >= 2^23; one normal in 256 needs another.
struct ByZeros {
  zo_u32 c[4][16];
};
constexpr ByZeros by_zeros() {
  ByZeros rows = {};
  for (int k = 0; k < 4; ++k)
    for (int zeros = 1; zeros <= 16; ++zeros) rows.c[k][zeros - 1] = ROWS.c[k][(127 + 31 - zeros) & 15];
  return rows;
}
alignas(64) constexpr ByZeros BY_ZEROS = by_zeros();

struct NeonWords {  // what formats.h needs to widen 8-bit floats, in 16-bit lanes
  typedef uint16x8_t U;
  struct F {
    float32x4_t low, high;
  };
  static ZO_HD U u(zo_u32 x) { return vdupq_n_u16((zo_u16)x); }
  static ZO_HD U or_(U a, U b) { return vorrq_u16(a, b); }
  static ZO_HD U and_(U a, U b) { return vandq_u16(a, b); }
  static ZO_HD U add_u(U a, U b) { return vaddq_u16(a, b); }
  template <int N> static ZO_HD U shl(U a) { return vshlq_n_u16(a, N); }
  static ZO_HD U load8_signed(const zo_u8* p) { return vreinterpretq_u16_s16(vmovl_s8(vld1_s8((const signed char*)p))); }
  static ZO_HD F half_value(U codes) {
    const float16x8_t halves = vreinterpretq_f16_u16(codes);
    return {vcvt_f32_f16(vget_low_f16(halves)), vcvt_high_f32_f16(halves)};
  }
};

struct Neon {
  typedef NeonWords Words;
  typedef uint32x4_t Word;  // of four blocks of Philox
  struct U {
    uint32x4_t low, high;
  };
  typedef NeonWords::F F;
  enum { WIDTH = 8, BLOCKS = 4, GROUPS = 4, REGISTERS = 16 };
  static ZO_HD U u(zo_u32 x) { return {vdupq_n_u32(x), vdupq_n_u32(x)}; }
  static ZO_HD F f(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
  static ZO_HD U or_(U a, U b) { return {vorrq_u32(a.low, b.low), vorrq_u32(a.high, b.high)}; }
  static ZO_HD U and_(U a, U b) { return {vandq_u32(a.low, b.low), vandq_u32(a.high, b.high)}; }
  static ZO_HD U xor_(U a, U b) { return {veorq_u32(a.low, b.low), veorq_u32(a.high, b.high)}; }
  static ZO_HD U and_or(U a, U mask, U bits) { return or_(and_(a, mask), bits); }
  static ZO_HD U xor_and(U a, U b, U mask) { return xor_(a, and_(b, mask)); }
  static ZO_HD U add_u(U a, U b) { return {vaddq_u32(a.low, b.low), vaddq_u32(a.high, b.high)}; }
  static ZO_HD U sub_u(U a, U b) { return {vsubq_u32(a.low, b.low), vsubq_u32(a.high, b.high)}; }
  template <int N> static ZO_HD U shl(U a) { return {vshlq_n_u32(a.low, N), vshlq_n_u32(a.high, N)}; }
  template <int N> static ZO_HD U shr(U a) { return {vshrq_n_u32(a.low, N), vshrq_n_u32(a.high, N)}; }
  // x where the mask is all ones, y where it is 0
  static ZO_HD U select(U mask, U x, U y) { return {vbslq_u32(mask.low, x.low, y.low), vbslq_u32(mask.high, x.high, y.high)}; }
  static ZO_HD uint32x4_t less(uint32x4_t a, uint32x4_t b) {
    return vcltq_s32(vreinterpretq_s32_u32(a), vreinterpretq_s32_u32(b));
  }
  static ZO_HD U select_less(U a, U b, U x, U y) { return select({less(a.low, b.low), less(a.high, b.high)}, x, y); }
  static ZO_HD uint32x4_t most(uint32x4_t a, uint32x4_t b) {
    return vreinterpretq_u32_s32(vmaxq_s32(vreinterpretq_s32_u32(a), vreinterpretq_s32_u32(b)));
  }
  static ZO_HD U most_u(U a, U b) { return {most(a.low, b.low), most(a.high, b.high)}; }
  static ZO_HD U select_greater(F a, F b, U x, U y) {
    return select({vcgtq_f32(a.low, b.low), vcgtq_f32(a.high, b.high)}, x, y);
  }
  static ZO_HD float32x4_t clamp(float32x4_t x, float low, float high) {
    return vminq_f32(vmaxq_f32(x, vdupq_n_f32(low)), vdupq_n_f32(high));
  }
  static ZO_HD F clamp(F x, float low, float high) { return {clamp(x.low, low, high), clamp(x.high, low, high)}; }
  static ZO_HD U select_nan(F v, U x, U y) { return select({vceqq_f32(v.low, v.low), vceqq_f32(v.high, v.high)}, y, x); }
  static ZO_HD F fma(F a, F b, F c) { return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)}; }
  static ZO_HD F mul(F a, F b) { return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)}; }
  static ZO_HD F add(F a, F b) { return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
  static ZO_HD F sqrt(F a) { return {vsqrtq_f32(a.low), vsqrtq_f32(a.high)}; }
  static ZO_HD float32x4_t to_float(uint32x4_t a) { return vcvtq_f32_s32(vreinterpretq_s32_u32(a)); }
  static ZO_HD F to_float(U a) { return {to_float(a.low), to_float(a.high)}; }
  static ZO_HD uint32x4_t truncate(float32x4_t a) { return vreinterpretq_u32_s32(vcvtq_s32_f32(a)); }
  static ZO_HD U truncate(F a) { return {truncate(a.low), truncate(a.high)}; }
  static ZO_HD U bits(F a) { return {vreinterpretq_u32_f32(a.low), vreinterpretq_u32_f32(a.high)}; }
  static ZO_HD F value(U a) { return {vreinterpretq_f32_u32(a.low), vreinterpretq_f32_u32(a.high)}; }

  // ---- Philox: words of four blocks side by side, products in 64-bit lanes, those of the first two blocks in `low`
  static ZO_HD uint32x4_t of64(uint64x2_t a) { return vreinterpretq_u32_u64(a); }
  static ZO_HD uint64x2_t as64(uint32x4_t a) { return vreinterpretq_u64_u32(a); }
  static ZO_HD Word word(zo_u64 x) { return vdupq_n_u32((zo_u32)x); }
  static ZO_HD U u64(zo_u64 x) { return {of64(vdupq_n_u64(x)), of64(vdupq_n_u64(x))}; }
  static ZO_HD U add64(U a, U b) {
    return {of64(vaddq_u64(as64(a.low), as64(b.low))), of64(vaddq_u64(as64(a.high), as64(b.high)))};
  }
  static ZO_HD U lanes() { return {of64(uint64x2_t{0, 1}), of64(uint64x2_t{2, 3})}; }
  static ZO_HD U mul64(Word a, Word b) {
    return {of64(vmull_u32(vget_low_u32(a), vget_low_u32(b))), of64(vmull_high_u32(a, b))};
  }
  static ZO_HD Word lower(U a) { return vuzp1q_u32(a.low, a.high); }
  static ZO_HD Word upper(U a) { return vuzp2q_u32(a.low, a.high); }
  // words into the upper halves
  static ZO_HD U lift(Word a) { return {vzip1q_u32(vdupq_n_u32(0), a), vzip2q_u32(vdupq_n_u32(0), a)}; }
  static ZO_HD Word xor_(Word a, Word b) { return veorq_u32(a, b); }
  static ZO_HD Word xor3(Word a, Word b, Word c) { return xor_(a, xor_(b, c)); }
  static ZO_HD U xor3(U a, U b, U c) { return xor_(a, xor_(b, c)); }
  static ZO_HD U merge(Word first, Word second) { return {vzip1q_u32(first, second), vzip2q_u32(first, second)}; }
  static ZO_HD F zip(float32x4_t a, float32x4_t b) { return {vzip1q_f32(a, b), vzip2q_f32(a, b)}; }
  static ZO_HD F zip_low(F a, F b) { return zip(a.low, b.low); }
  static ZO_HD F zip_high(F a, F b) { return zip(a.high, b.high); }
  static ZO_HD U zip64(uint32x4_t a, uint32x4_t b) {
    return {of64(vzip1q_u64(as64(a), as64(b))), of64(vzip2q_u64(as64(a), as64(b)))};
  }
  static ZO_HD U unpack64_low(U a, U b) { return zip64(a.low, b.low); }
  static ZO_HD U unpack64_high(U a, U b) { return zip64(a.high, b.high); }
  // 128 bits of a, 128 bits of b, and so on
  static ZO_HD F zip128_low(F a, F b) { return {a.low, b.low}; }
  static ZO_HD F zip128_high(F a, F b) { return {a.high, b.high}; }
  static ZO_HD void store_blocks(zo_u32* out, Word c0, Word c1, Word c2, Word c3) {
    const U a = merge(c0, c1), b = merge(c2, c3);
    store_bits(out, unpack64_low(a, b));
    store_bits(out + 8, unpack64_high(a, b));
  }

  // ---- the Gaussian: four bytes of a table of words at once
  // bytes 4 k .. 4 k + 3 in each word, k = index - FIRST
  template <int FIRST>
  static ZO_HD uint8x16_t bytes_of(uint32x4_t index) {
    return vreinterpretq_u8_u32(
        vmlaq_u32(vdupq_n_u32(0x03020100u - FIRST * 0x04040404u), index, vdupq_n_u32(0x04040404u)));
  }
  template <class Pick>
  static ZO_HD F gaussian_of(U s, F a, const uint8x16_t (&bytes)[2], Pick pick) {
    return zo_gaussian<Neon>(s, a, [&](int k) -> F {
      return {vreinterpretq_f32_u8(pick(BY_ZEROS.c[k], bytes[0])), vreinterpretq_f32_u8(pick(BY_ZEROS.c[k], bytes[1]))};
    });
  }
  static ZO_HD F gaussian(U s) {
    const U argument = and_or(s, u(0x7fff0000u), u(0x8000u));
    const F a = zo_gaussian_argument<Neon>(s);
    const uint32x4_t low = vclzq_u32(argument.low), high = vclzq_u32(argument.high);
    const uint8x16_t bytes[2] = {bytes_of<1>(low), bytes_of<1>(high)};
    if (__builtin_expect(vmaxvq_u32(vmaxq_u32(low, high)) > 8, 0))  // one vector in 32
      return gaussian_of(s, a, bytes, [](const zo_u32* rows, uint8x16_t at) {
        return vqtbl4q_u8(vld1q_u8_x4((const zo_u8*)rows), at);
      });
    return gaussian_of(s, a, bytes, [](const zo_u32* rows, uint8x16_t at) {
      return vqtbl2q_u8(vld1q_u8_x2((const zo_u8*)rows), at);
    });
  }

  // ---- loads and stores
  static ZO_HD F load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
  static ZO_HD void store(float* p, F x) {
    vst1q_f32(p, x.low);
    vst1q_f32(p + 4, x.high);
  }
  static ZO_HD U load_bits(const void* p) {
    return {vreinterpretq_u32_u8(vld1q_u8((const zo_u8*)p)), vreinterpretq_u32_u8(vld1q_u8((const zo_u8*)p + 16))};
  }
  static ZO_HD void store_bits(void* p, U x) {
    vst1q_u8((zo_u8*)p, vreinterpretq_u8_u32(x.low));
    vst1q_u8((zo_u8*)p + 16, vreinterpretq_u8_u32(x.high));
  }
  static ZO_HD void store_past_cache(void* p, U x) { store_bits(p, x); }  // no such store of one register here
  static ZO_HD U widen(uint16x8_t x) { return {vmovl_u16(vget_low_u16(x)), vmovl_high_u16(x)}; }
  // the lower halves of the words
  static ZO_HD uint16x8_t narrow(U x) {
    return vuzp1q_u16(vreinterpretq_u16_u32(x.low), vreinterpretq_u16_u32(x.high));
  }
  static ZO_HD U load16(const void* p) { return widen(vreinterpretq_u16_u8(vld1q_u8((const zo_u8*)p))); }
  static ZO_HD U load8(const zo_u8* p) { return widen(vmovl_u8(vld1_u8(p))); }
  static ZO_HD void store8(zo_u8* p, U x) { vst1_u8(p, vmovn_u16(narrow(x))); }
  // elements i.. of a plane of half-bytes
  static ZO_HD U load4(const zo_u8* p, int i) {
    zo_u32 codes;
    __builtin_memcpy(&codes, p + i / 2, 4);
    const uint32x4_t all = vdupq_n_u32(codes);
    return and_({vshlq_u32(all, int32x4_t{0, -4, -8, -12}), vshlq_u32(all, int32x4_t{-16, -20, -24, -28})}, u(15));
  }
  static ZO_HD F lookup(const float* table, U index) {
    const uint8x16x4_t all = vld1q_u8_x4((const zo_u8*)table);
    return {vreinterpretq_f32_u8(vqtbl4q_u8(all, bytes_of<0>(index.low))),
            vreinterpretq_f32_u8(vqtbl4q_u8(all, bytes_of<0>(index.high)))};
  }
  static ZO_HD U pack16(U a, U b) { return {vreinterpretq_u32_u16(narrow(a)), vreinterpretq_u32_u16(narrow(b))}; }
  static ZO_HD uint32x4_t upper16(U x) {
    return vreinterpretq_u32_u16(vuzp2q_u16(vreinterpretq_u16_u32(x.low), vreinterpretq_u16_u32(x.high)));
  }
  static ZO_HD U pack_upper16(U a, U b) { return {upper16(a), upper16(b)}; }
  static ZO_HD F half_value(U codes) { return Words::half_value(narrow(codes)); }
  static ZO_HD U half_round(F x) {
    const float16x8_t halves = vcvt_high_f16_f32(vcvt_f16_f32(x.low), x.high);
    return select_nan(x, u(0x7e00), widen(vreinterpretq_u16_f16(halves)));
  }
  static ZO_HD F add_signed(F w, F scale, const zo_u32* signs, int i) {
    const uint32x4_t set = vdupq_n_u32(((const zo_u8*)signs)[i / 8]);
    const U minus = {vtstq_u32(set, uint32x4_t{1, 2, 4, 8}), vtstq_u32(set, uint32x4_t{16, 32, 64, 128})};
    return add(w, value(select(minus, xor_(bits(scale), u(0x80000000u)), bits(scale))));
  }
};

}  // namespace

extern "C" zo_kernels zo_kernels_neon(void) { return kernels<Neon>(); }
