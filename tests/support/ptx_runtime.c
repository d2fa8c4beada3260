// What translated PTX (ptx_to_c.py) stands on: conversions, checked memory, the threads of a warp as coroutines.
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int8_t s8;
typedef int16_t s16;
typedef int32_t s32;
typedef int64_t s64;

static float F(u32 u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
static u32 U(float f) {
  u32 u;
  memcpy(&u, &f, 4);
  return u;
}
static int is_nan(float x) { return (U(x) & 0x7fffffffu) > 0x7f800000u; }
static u16 bf16(float x) { return is_nan(x) ? 0x7fff : (u16)((U(x) + 0x7fffu + ((U(x) >> 16) & 1u)) >> 16); }
static u16 f16(float x) {
  if (is_nan(x)) return 0x7fff;
  _Float16 h = (_Float16)x;
  u16 r;
  memcpy(&r, &h, 2);
  return r;
}
static float from_f16(u16 h) {
  _Float16 x;
  memcpy(&x, &h, 2);
  return (float)x;
}
static s32 rzi(float x) {  // saturates, and takes NaN to 0, as PTX does
  if (is_nan(x)) return 0;
  return x >= 2147483648.0f ? 2147483647 : x < -2147483648.0f ? -2147483647 - 1 : (s32)x;
}
static s32 rni(float x) { return rzi(rintf(x)); }
static u32 prmt(u32 a, u32 b, u32 selector) {
  u64 both = (u64)b << 32 | a;
  u32 r = 0;
  for (int i = 0; i < 4; i++) {
    u32 c = selector >> 4 * i & 15, byte = both >> 8 * (c & 7) & 255;
    if (c & 8) byte = byte & 128 ? 255 : 0;
    r |= byte << 8 * i;
  }
  return r;
}

static void die(const char* what, u64 a, int line) {
  fprintf(stderr, "%s: %llx at line %d of the kernel\n", what, (unsigned long long)a, line);
  fflush(stderr);
  abort();
}

// ---- global memory: aligned, and inside of what the caller declared

#define MAX_RANGES 64
static u64 range_at[MAX_RANGES], range_size[MAX_RANGES];
static int ranges;
static u64 own_at[4], own_size[4];  // of the module itself
static int owns;
static void own(u64 at, u64 size) {
  if (owns == 4) die("more tables than there is room for", at, 0);
  own_at[owns] = at, own_size[owns++] = size;
}
void zo_ranges(int n, const u64* at, const u64* size) {
  ranges = n;
  for (int i = 0; i < n; i++) range_at[i] = at[i], range_size[i] = size[i];
}
static void check(u64 a, u64 size, int line) {
  if (a % size) die("misaligned access", a, line);
  for (int i = 0; i < ranges; i++)
    if (a >= range_at[i] && a + size <= range_at[i] + range_size[i]) return;
  for (int i = 0; i < owns; i++)
    if (a >= own_at[i] && a + size <= own_at[i] + own_size[i]) return;
  die("access outside of every range", a, line);
}

// ---- warps: every thread runs to the next shuffle, then the next thread does

typedef void (*kernel)(const char*, u32, u32, u32, u32);
static ucontext_t scheduler, threads[32];
static int now, done[32], at_line[32];
static u32 mailbox[2][32], turns[32];
static char* stacks;
static kernel the_kernel;
static const char* the_args;
static u32 the_tid, the_block, the_grid, the_threads;

static u32 shfl(int butterfly, u32 value, u32 b, int line) {
  const int me = now;
  const u32 turn = turns[me]++ & 1;  // two mailboxes: nobody writes one that someone may still read
  mailbox[turn][me] = value;
  at_line[me] = line;
  swapcontext(&threads[me], &scheduler);
  return mailbox[turn][(butterfly ? me ^ b : b) & 31];
}

static void body(void) {
  the_kernel(the_args, the_tid + now, the_threads, the_block, the_grid);
  done[now] = 1;
}

static void run_warp(void) {
  if (!stacks) stacks = malloc(32 << 20);
  for (int i = 0; i < 32; i++) {
    getcontext(&threads[i]);
    threads[i].uc_stack.ss_sp = stacks + (i << 20);
    threads[i].uc_stack.ss_size = 1 << 20;
    threads[i].uc_link = &scheduler;
    done[i] = turns[i] = at_line[i] = 0;
    makecontext(&threads[i], body, 0);
  }
  for (;;) {
    int ended = 0;
    for (now = 0; now < 32; now++)
      if (!done[now]) swapcontext(&scheduler, &threads[now]);
    for (int i = 0; i < 32; i++) ended += done[i];
    if (ended == 32) return;
    if (ended) die("a warp diverged at a shuffle, threads ended", ended, 0);
    for (int i = 1; i < 32; i++)
      if (at_line[i] != at_line[0]) die("a warp diverged at a shuffle, other line", at_line[i], at_line[0]);
  }
}

static void launch(kernel k, int shuffles, const char* args, u32 num_threads, u32 grid) {
  the_kernel = k, the_args = args, the_grid = grid, the_threads = num_threads;
  for (the_block = 0; the_block < grid; the_block++)
    for (the_tid = 0; the_tid < num_threads; the_tid += 32)
      if (shuffles)
        run_warp();
      else
        for (now = 0; now < 32; now++) k(args, the_tid + now, num_threads, the_block, grid);
}
