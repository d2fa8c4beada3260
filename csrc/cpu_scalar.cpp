// Portable kernels: the tile code with vectors of one element. Any C++17 compiler and CPU; slow without hardware fma.
#include "cpu_tile.h"

namespace {

struct Scalar : ZoScalar {
  enum { WIDTH = 1, BLOCKS = 1, GROUPS = 1 };
  typedef Scalar Words;
  static ZO_HD float load(const float* p) {
    float x;
    __builtin_memcpy(&x, p, 4);
    return x;
  }
  static ZO_HD void store(float* p, float x) { __builtin_memcpy(p, &x, 4); }
  static ZO_HD zo_u32 load16(const void* p) {
    zo_u16 x;
    __builtin_memcpy(&x, p, 2);
    return x;
  }
  static ZO_HD zo_u32 load8(const zo_u8* p) { return *p; }
  static ZO_HD zo_u32 load8_signed(const zo_u8* p) { return (zo_u32)(signed char)*p; }
  static ZO_HD void store8(zo_u8* p, zo_u32 x) { *p = (zo_u8)x; }
  // elements i.. of a plane of half-bytes
  static ZO_HD zo_u32 load4(const zo_u8* p, int i) { return p[i / 2] >> (4 * (i & 1)) & 15u; }
  static ZO_HD float lookup(const float* table, zo_u32 index) { return table[index]; }
  static ZO_HD float gaussian(zo_u32 s) {
    const float a = zo_gaussian_argument<ZoScalar>(s);
    const zo_u32 row = bits(a) >> 23 & 15u;
    return zo_gaussian<ZoScalar>(s, a, [&](int k) { return value(ROWS.c[k][row]); });
  }
  static ZO_HD zo_u32 load_bits(const void* p) {
    zo_u32 x;
    __builtin_memcpy(&x, p, 4);
    return x;
  }
  static ZO_HD void store_bits(void* p, zo_u32 x) { __builtin_memcpy(p, &x, 4); }
  static ZO_HD void store_past_cache(void* p, zo_u32 x) { store_bits(p, x); }
  static ZO_HD zo_u32 pack16(zo_u32 a, zo_u32 b) { return a | b << 16; }
  static ZO_HD zo_u32 pack_upper16(zo_u32 a, zo_u32 b) { return a >> 16 | (b & 0xffff0000u); }
  static ZO_HD float half_value(zo_u32 code) { return zo_fp16_decode<ZoScalar>(code & 0xffffu); }
  static ZO_HD zo_u32 half_round(float x) { return zo_fp16_round<ZoScalar>(x); }
  static ZO_HD float add_signed(float w, float scale, const zo_u32* signs, int i) {
    return zo_add_sign<ZoScalar>(w, scale, signs[i >> 5] >> (i & 31) << 31);
  }
};

}  // namespace

extern "C" zo_kernels zo_kernels_scalar(void) { return kernels<Scalar>(); }
