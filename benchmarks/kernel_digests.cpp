// Digests of everything that the CPU library computes, a line for each case and instruction set that it has here:
//
//   scalar pass fp32 3 0123456789abcdef
//
// Inputs are drawn as integers, so that two machines draw the same; benchmarks/aarch64.py compares the lines of one build with
// those of another, and of each instruction set with the scalar ones. Linked with the library as it is shipped.
//
//   kernel_digests [cases of each format]           all of them
//   kernel_digests work ISA noise|pass ELEMENTS     one call, for counting its instructions
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "api.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

typedef std::vector<zo_u8> Bytes;
const char* const ISA_NAMES[] = {"scalar", "avx2", "avx512", "neon"};
static_assert(sizeof ISA_NAMES / sizeof *ISA_NAMES == ZO_NUM_ISAS, "a name each");
#define NAME(NAME, ...) #NAME,
const char* const FORMAT_NAMES[] = {ZO_FORMATS(NAME)};

// ---- drawing

class Chance {
 public:
  explicit Chance(zo_u64 seed) : state_(seed) {}
  zo_u64 word() {  // splitmix64
    zo_u64 x = state_ += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
  }
  zo_u64 below(zo_u64 n) { return (word() >> 11) % n; }
  bool in(zo_u64 n) { return below(n) == 0; }  // once in n
  template <class T, size_t N>
  T of(const T (&choices)[N]) { return choices[below(N)]; }

 private:
  zo_u64 state_;
};

// Weights around 2^-6 with all that is special among them: subnormals, infinities, NaNs of both kinds and signs.
zo_u32 weight(Chance& chance) {
  const zo_u32 special[] = {0,          0x80000000u, 0x000116c2u, 0x80000001u, 0xb380a7c5u, 0x37fba882u, 0x477fe000u,
                            0x7f800000u, 0xff800000u, 0x7fc00000u, 0x7f800001u, 0xffc12345u, 0x3f800000u, 0xc2fe0000u};
  if (chance.in(60)) return chance.of(special);
  const zo_u64 word = chance.word();
  return (zo_u32)(word & 0x807fffffu) | (zo_u32)(chance.in(9) ? 60 + (word >> 32) % 90 : 115 + (word >> 32) % 8) << 23;
}

Bytes any_bytes(Chance& chance, zo_u64 size) {
  Bytes bytes(size);
  for (zo_u8& byte : bytes) byte = (zo_u8)chance.word();
  return bytes;
}

Bytes floats(Chance& chance, zo_u64 count, bool positive) {
  Bytes bytes(4 * count);
  for (zo_u64 i = 0; i < count; ++i) {
    zo_u32 x = weight(chance);
    if (positive && x << 1 <= 0xff000000u) x &= 0x7fffffffu;
    memcpy(&bytes[4 * i], &x, 4);
  }
  return bytes;
}

// ---- digests

class Digest {
 public:
  void add(const Bytes& bytes) {
    for (zo_u8 byte : bytes) add(byte);
    add(bytes.size());
  }
  void add(zo_u64 x) { sum_ = (sum_ ^ x) * 0x9e3779b97f4a7c15u, sum_ ^= sum_ >> 29; }
  zo_u64 sum() const { return sum_; }

 private:
  zo_u64 sum_ = 0xcbf29ce484222325u;
};

void say(int isa, const char* what, const char* name, zo_u64 number, const Digest& digest) {
  printf("%s %s %s %llu %016llx\n", ISA_NAMES[isa], what, name, number, digest.sum());
}

void demand(int error, const char* what) {
  if (!error) return;
  fprintf(stderr, "%s: the library returned %d\n", what, error);
  exit(1);
}

// ---- a caller whose thread flushes subnormals and rounds upwards

#if defined(__x86_64__)
zo_u64 float_mode() { return _mm_getcsr() & ~0x3fu; }  // but for the exceptions that were seen
void set_float_mode(zo_u64 mode) { _mm_setcsr((unsigned)mode); }
const zo_u64 HOSTILE = 0x1f80 | 0x8040 | 0x4000;
#elif defined(__aarch64__)
zo_u64 float_mode() {
  zo_u64 mode;
  asm volatile("mrs %0, fpcr" : "=r"(mode));
  return mode;
}
void set_float_mode(zo_u64 mode) { asm volatile("msr fpcr, %0" : : "r"(mode) : "memory"); }
const zo_u64 HOSTILE = 1 << 22 | 1 << 24 | 1 << 25 | 1 << 26;  // upwards, flush to zero, default NaN, other half floats
#else
zo_u64 float_mode() { return 0; }
void set_float_mode(zo_u64) {}
const zo_u64 HOSTILE = 0;
#endif

int run_pass(const zo_pass& pass, int isa, int threads, bool hostile) {
  const zo_u64 before = float_mode();
  if (hostile) set_float_mode(HOSTILE);
  const zo_u64 inside = float_mode();
  const int error = zo_cpu_pass(&pass, isa, threads);
  const bool kept = float_mode() == inside;
  if (hostile) set_float_mode(before);
  return kept ? error : 99;
}

// ---- one pass

struct Case {
  zo_pass pass = {};
  Bytes values, scales, minima, residual, list;
  std::vector<zo_update> updates, terms;
  std::vector<zo_lane> lanes;
  std::vector<zo_i64> rows;
  int threads = 1;
};

zo_u64 up(zo_u64 n, zo_u64 unit) { return (n + unit - 1) / unit; }

const zo_u64 SIZES[] = {1, 3, 64, 127, 128, 129, 1000, 1024, 1025, 2048, 3333};
const zo_u64 OFFSETS[] = {0, 0, 100, 128, 1023, 7168, (1ull << 34) - 500, (1ull << 35) - 700, (1ull << 40) + 3};
const float COEFFS[] = {0.0f, 1e-6f, -3e-4f, 0.25f}, DECAYS[] = {1.0f, 1.0f, 0.999f, 0.75f},
            SCALES[] = {1e-3f, -1e-3f, 0.0f, 100.0f};

// Where the parameter lies, and how many elements there are.
void draw_place(Chance& chance, int format, zo_pass& pass) {
  pass.numel = chance.in(3) ? 1 + chance.below(5000) : chance.of(SIZES);
  pass.offset = chance.of(OFFSETS);
  zo_u64 unit = 1;
  if (zo_own_scale_bytes(format)) unit = pass.group = format == ZO_NVFP4_TWO ? 16 : 16u << chance.below(4);
  if (format == ZO_NVFP4_TWO) unit = ZO_TWO;
  if (format == ZO_MXFP4_ACROSS) {
    pass.across = 8 * (1 + (zo_u32)chance.below(40));
    unit = ZO_BAND * pass.across;
  }
  pass.offset = pass.offset / unit * unit;
  pass.total = pass.numel;
}

// Rows, in any order and some twice, some not there.
void draw_rows(Chance& chance, Case& c) {
  const zo_u64 held = 1 + chance.below(9);
  c.pass.numel = 1 + chance.below(400);
  c.pass.total = held * c.pass.numel;
  c.pass.offset = 0;
  c.rows.resize(chance.below(12));
  for (zo_i64& row : c.rows) row = (zo_i64)chance.below(held + 2);
}

void draw_planes(Chance& chance, int format, Case& c) {
  const zo_u64 n = c.pass.total, groups = c.pass.group ? up(n, c.pass.group) : 0;
  c.values = any_bytes(chance, up(n * zo_format_bits(format), 8));
  if (zo_is_plain(format) && format != ZO_FP16)
    for (zo_u64 i = 0; i < n; ++i) {
      const zo_u32 x = weight(chance);
      memcpy(&c.values[i * zo_format_bytes(format)], (const zo_u8*)&x + 4 - zo_format_bytes(format), zo_format_bytes(format));
    }
  c.scales = zo_scale_bytes(format) == 4 ? floats(chance, groups, true)
             : c.pass.across             ? any_bytes(chance, up(up(n, c.pass.across), ZO_BAND) * c.pass.across)
                                         : any_bytes(chance, groups);
  if (zo_scale_bytes(format) == 1)
    for (zo_u8& exponent : c.scales) exponent = (zo_u8)(chance.in(20) ? exponent : 110 + exponent % 20);
  c.minima = format == ZO_NVFP4_TWO ? floats(chance, up(n, ZO_TWO), false)
             : zo_minimum_bytes(format) == 4 ? floats(chance, groups, false)
                                             : any_bytes(chance, groups * zo_minimum_bytes(format));
  c.residual = any_bytes(chance, n * zo_residual_bytes(format));
}

void draw_mask(Chance& chance, Case& c) {
  zo_pass& pass = c.pass;
  pass.mask = (zo_u32)chance.below(pass.offset < 1 << 20 ? ZO_NUM_MASKS : ZO_MASK_LISTED);
  if (pass.mask == ZO_MASK_MAGNITUDE) pass.mask_limit = 118u << 23;
  if (pass.mask == ZO_MASK_RANDOM) pass.mask_seed = chance.word(), pass.mask_limit = (zo_u32)chance.below(65537);
  if (pass.mask != ZO_MASK_LISTED) return;
  std::vector<zo_u32> starts = {0};
  std::vector<zo_u16> places;
  for (zo_u64 tile = 0; tile * ZO_LISTED < pass.offset + pass.total; ++tile) {
    for (int at = 0; at < ZO_LISTED; ++at)
      if (chance.in(3)) places.push_back((zo_u16)at);
    starts.push_back((zo_u32)places.size());
  }
  pass.mask_limit = (zo_u32)starts.size() - 1;
  c.list.resize(4 * starts.size() + 2 * places.size());
  memcpy(c.list.data(), starts.data(), 4 * starts.size());
  memcpy(c.list.data() + 4 * starts.size(), places.data(), 2 * places.size());
}

Case draw_case(Chance& chance, int format, bool scales) {
  Case c;
  zo_pass& pass = c.pass;
  pass.format = (zo_u32)format;
  draw_place(chance, format, pass);
  if (chance.in(6)) draw_rows(chance, c);
  draw_planes(chance, format, c);
  pass.param_id = (zo_u32)chance.word();
  pass.distribution = (zo_u32)chance.below(ZO_NUM_NOISES);
  pass.rounds = chance.in(2) ? 7 : 10;
  pass.flags = (chance.in(2) ? ZO_STOCHASTIC : 0) | (c.rows.empty() && !chance.in(4) ? ZO_WRITE_BACK : 0);
  if (scales) pass.flags |= ZO_TARGET_SCALES;
  if (format == ZO_INT4 && chance.in(2)) pass.flags |= ZO_CENTRED;
  if (zo_residual_bytes(format) && chance.in(3)) pass.flags |= ZO_MASTER;
  if (!scales) draw_mask(chance, c);
  if (!scales && chance.in(3)) {  // rows that end with a vector of elements, within one, and many in one
    static const zo_u32 columns[] = {3, 5, 61, 384, 400, 768, 3000};
    pass.distribution = ZO_GAUSSIAN;
    pass.rank = 1 + (zo_u32)chance.below(5);
    pass.columns = columns[chance.below(7)];
  }
  c.updates.resize(chance.below(4));
  for (zo_update& u : c.updates) {
    const bool folds = (zo_trains(format) || scales) && !chance.in(4);
    u = {chance.word(), chance.of(COEFFS), chance.of(DECAYS), 0, 0};
    if (folds) u.flags |= ZO_UPDATE_FOLD;
    if (chance.in(3)) u.flags |= ZO_UPDATE_SAME_STEP;
  }
  c.terms.resize(chance.below(5));
  for (zo_update& term : c.terms) term = {chance.word(), chance.of(COEFFS), 0.0f, 0, 0};
  const zo_u64 seeds[] = {chance.word(), chance.word()};
  c.lanes.resize(chance.below(5));
  for (zo_lane& lane : c.lanes) {
    lane = {chance.of(seeds), nullptr, chance.of(SCALES), (zo_u32)chance.below(3)};
    if (!chance.in(3)) continue;
    const zo_u64 first = chance.below(c.terms.size() + 1);
    lane.seed = first | chance.below(c.terms.size() + 1 - first) << 32;
    lane.format |= ZO_LANE_SUM;
  }
  return c;
}

// Runs it, which changes its planes; the lanes.
std::vector<Bytes> run(Case& c, int isa, bool hostile, const char* name) {
  const zo_u64 outputs = c.rows.empty() ? c.pass.numel : c.rows.size() * c.pass.numel;
  std::vector<Bytes> outs;
  for (const zo_lane& lane : c.lanes) outs.emplace_back(outputs * zo_format_bytes((int)(lane.format & 255)), (zo_u8)7);
  for (size_t j = 0; j < outs.size(); ++j) c.lanes[j].out = outs[j].data();
  zo_pass& pass = c.pass;
  pass.stored = c.values.data();
  pass.scales = c.scales.data();
  pass.minima = c.minima.data();
  pass.residual = c.residual.data();
  pass.rows = c.rows.empty() ? nullptr : c.rows.data();
  pass.num_rows = c.rows.size();
  static const zo_update no_update = {};
  static const zo_lane no_lane = {};
  pass.updates = c.updates.empty() ? &no_update : c.updates.data();
  pass.terms = c.terms.empty() ? &no_update : c.terms.data();
  pass.lanes = c.lanes.empty() ? &no_lane : c.lanes.data();
  pass.num_updates = (zo_u32)c.updates.size();
  pass.num_terms = (zo_u32)c.terms.size();
  pass.num_lanes = (zo_u32)c.lanes.size();
  if (pass.mask == ZO_MASK_LISTED) pass.mask_seed = (zo_u64)c.list.data();
  demand(run_pass(pass, isa, c.threads, hostile), name);
  return outs;
}

// A copy is run: of each instruction set the same.
Digest digest_of(Case c, int isa, bool hostile, const char* name) {
  const std::vector<Bytes> outs = run(c, isa, hostile, name);
  Digest digest;
  for (const Bytes* plane : {&c.values, &c.scales, &c.minima, &c.residual}) digest.add(*plane);
  for (const Bytes& out : outs) digest.add(out);
  return digest;
}

// ---- all cases of one instruction set

void digest_noise(int isa) {
  Bytes table(4 << 16);
  demand(zo_cpu_gaussian_table((float*)table.data(), isa), "gaussian_table");
  Digest all;
  all.add(table);
  say(isa, "table", "gaussian", 0, all);
  const char* const names[] = {"boxmuller", "rademacher", "gaussian"};
  // a block number's lower word wraps around inside of each: 4, 128, 8 elements a block
  const zo_u64 ends[] = {1ull << 34, 1ull << 39, 1ull << 35};
  for (zo_u32 kind = 0; kind < ZO_NUM_NOISES; ++kind)
    for (zo_u32 rounds = 7; rounds <= 10; rounds += 3) {
      Digest digest;
      for (zo_u64 offset : {(zo_u64)0, (zo_u64)77, ends[kind] - 1500, (1ull << 50) + 5}) {
        Bytes z(4 * 3001);
        demand(zo_cpu_noise((float*)z.data(), 3001, offset, 0x0123456789abcdefu + offset, 0xdeadbeefu, kind, rounds, isa, 1),
               "noise");
        digest.add(z);
      }
      say(isa, "noise", names[kind], rounds, digest);
    }
}

// Values halfway between two codes, as far as a group's scale is 1.
Bytes middles(Chance& chance, zo_u32 format, zo_u64 count) {
  const float choices[] = ZO_NF4_MIDDLES;
  Bytes bytes(count * zo_format_bytes((int)format));
  for (zo_u64 i = 0; i < count && format == ZO_FP32; ++i) {
    const float x = chance.in(9) ? -1.0f : chance.of(choices);
    memcpy(&bytes[4 * i], &x, 4);
  }
  return bytes;
}

void digest_encode(int isa, int format, int cases) {
  for (int i = 0; i < cases; ++i) {
    Chance chance(1000 * (zo_u64)format + i);
    Case c;
    c.pass.format = (zo_u32)format;
    draw_place(chance, format, c.pass);
    draw_planes(chance, format, c);
    c.pass.flags = format == ZO_INT4 && chance.in(2) ? ZO_CENTRED : 0;
    const zo_u32 from = i ? (zo_u32)chance.below(3) : (zo_u32)ZO_FP32;
    Case source;
    source.pass.total = c.pass.numel;
    draw_planes(chance, (int)from, source);
    if (i == 0) source.values = middles(chance, from, c.pass.numel);
    c.pass.stored = c.values.data();
    c.pass.scales = c.scales.data();
    c.pass.minima = c.minima.data();
    c.pass.residual = c.residual.data();
    zo_u64 found[2] = {};
    demand(zo_cpu_encode(&c.pass, source.values.data(), from, found, isa, 1), FORMAT_NAMES[format]);
    Digest digest;
    for (const Bytes* plane : {&c.values, &c.scales, &c.minima, &c.residual}) digest.add(*plane);
    for (zo_u64 count : found) digest.add(count);
    say(isa, "encode", FORMAT_NAMES[format], (zo_u64)i, digest);
  }
}

void digest_passes(int isa, int format, int cases, bool scales) {
  for (int i = 0; i < cases; ++i) {
    Chance chance(1000003 * ((zo_u64)format + 1) + 2 * (zo_u64)i + scales);
    const Case c = draw_case(chance, format, scales);
    say(isa, scales ? "scales" : "pass", FORMAT_NAMES[format], (zo_u64)i, digest_of(c, isa, i % 4 == 3, FORMAT_NAMES[format]));
  }
}

// Subnormal half floats, rounded stochastically: a rounding of the last digits differently shows in one of 2^16.
void digest_subnormal(int isa) {
  Chance chance(6);
  Case c;
  c.pass.format = ZO_FP16;
  c.pass.numel = c.pass.total = 1 << 19;
  c.pass.distribution = ZO_GAUSSIAN;
  c.pass.rounds = 7;
  c.pass.flags = ZO_WRITE_BACK | ZO_STOCHASTIC;
  c.values = any_bytes(chance, 2 * c.pass.numel);
  for (zo_u64 i = 0; i < c.pass.numel; ++i) c.values[2 * i] &= 0x3f, c.values[2 * i + 1] &= 0x80;  // both signs
  c.updates = {{1, 1e-6f, 1.0f, ZO_UPDATE_FOLD, 0}};
  say(isa, "subnormal", "fp16", 0, digest_of(c, isa, false, "subnormal"));
}

// Enough for two threads, and for lanes that are written past the cache where an instruction set does that.
void digest_large(int isa) {
  Chance chance(5);
  Case c;
  c.pass.format = ZO_BF16;
  c.pass.numel = c.pass.total = (9 << 20) + 333;
  c.pass.distribution = ZO_RADEMACHER;
  c.pass.rounds = 7;
  c.values = any_bytes(chance, 2 * c.pass.numel);
  c.lanes = {{1, nullptr, 1e-3f, ZO_BF16}, {1, nullptr, -1e-3f, ZO_BF16}};
  c.threads = 2;
  say(isa, "large", "bf16", 0, digest_of(c, isa, false, "large"));
}

int work(int isa, bool pass, zo_u64 numel) {
  Chance chance(1);
  if (!pass) {
    Bytes z(4 * numel);
    return zo_cpu_noise((float*)z.data(), numel, 0, 1, 2, ZO_GAUSSIAN, 10, isa, 1);
  }
  Case c;
  c.pass.format = ZO_BF16;
  c.pass.numel = c.pass.total = numel;
  c.pass.distribution = ZO_GAUSSIAN;
  c.pass.rounds = 10;
  c.pass.flags = ZO_WRITE_BACK | ZO_STOCHASTIC;
  c.values.resize(2 * numel);
  c.updates = {{1, 1e-3f, 1.0f, ZO_UPDATE_FOLD, 0}};
  c.lanes = {{2, nullptr, 1e-3f, ZO_BF16}, {2, nullptr, -1e-3f, ZO_BF16}};
  run(c, isa, false, "pass");
  return 0;
}

}  // namespace

int main(int count, char** words) {
  if (count == 5 && !strcmp(words[1], "work")) {
    for (int isa = 0; isa < ZO_NUM_ISAS; ++isa)
      if (!strcmp(words[2], ISA_NAMES[isa])) return work(isa, !strcmp(words[3], "pass"), strtoull(words[4], nullptr, 10));
    return 2;
  }
  const int cases = count > 1 ? atoi(words[1]) : 24;
  for (int isa = 0; isa < ZO_NUM_ISAS; ++isa) {
    if (!(zo_cpu_isas() >> isa & 1)) continue;
    digest_noise(isa);
    digest_subnormal(isa);
    for (int format = 0; format < ZO_NUM_FORMATS; ++format) {
      if (!zo_is_kept(format)) digest_encode(isa, format, cases);
      digest_passes(isa, format, cases, false);
      if (zo_trains_scales(format)) digest_passes(isa, format, cases, true);
    }
    if (cases >= 24) digest_large(isa);
  }
  return 0;
}
