// Reads and writes of block files with the checksum of what passes: one call an extent, so no Python runs in between.
//
// Bytes are summed right after they were read and right before they are written, 256 kB at a time, while they are in
// the core's cache. Python doing the same would take the interpreter's lock from the computing thread twice for each.
#include <errno.h>
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>

#include "cpu_threads.h"

extern "C" uint64_t zo_cpu_checksum(const unsigned char* data, uint64_t nbytes, uint64_t offset);

namespace {

const uint64_t CACHED = 64 * 4096;  // whole chunks of the checksum, so the sums add up

struct Extent {
  int fd;
  unsigned char* data;
  uint64_t nbytes, at, begin;  // `begin`: place of the first byte in its block; the checksum depends on it
  std::atomic<uint64_t> sum, done;
  std::atomic<int> error;
};

void read_run(void* context, uint64_t c) {
  Extent& e = *(Extent*)context;
  const uint64_t from = c * CACHED, size = e.nbytes - from < CACHED ? e.nbytes - from : CACHED;
  uint64_t done = 0;
  while (done < size) {
    const ssize_t n = pread(e.fd, e.data + from + done, size - done, (off_t)(e.at + from + done));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) e.error.store(errno, std::memory_order_relaxed);
    if (n <= 0) return;  // the file ends here: `done` tells
    done += (uint64_t)n;
  }
  e.sum.fetch_add(zo_cpu_checksum(e.data + from, size, e.begin + from), std::memory_order_relaxed);
  e.done.fetch_add(done, std::memory_order_relaxed);
}

}  // namespace

// Fills data with nbytes from file offset `at`. Returns how many bytes came in whole runs (nbytes, unless the file ends
// early), or -errno. *sum: their checksum. threads counts the caller.
extern "C" __attribute__((visibility("default"))) int64_t zo_cpu_read(int fd, unsigned char* data, uint64_t nbytes,
                                                                      uint64_t at, uint64_t begin, int threads,
                                                                      uint64_t* sum) {
  Extent e = {fd, data, nbytes, at, begin, {0}, {0}, {0}};
  zo::run(read_run, &e, (nbytes + CACHED - 1) / CACHED, threads);
  *sum = e.sum;
  return e.error ? -(int64_t)e.error : (int64_t)e.done;
}

// Writes nbytes at file offset `at`; returns nbytes or -errno. One thread: a file takes one writer at a time.
extern "C" __attribute__((visibility("default"))) int64_t zo_cpu_write(int fd, const unsigned char* data,
                                                                       uint64_t nbytes, uint64_t at, uint64_t begin,
                                                                       uint64_t* sum) {
  uint64_t total = 0;
  for (uint64_t from = 0; from < nbytes; from += CACHED) {
    const uint64_t size = nbytes - from < CACHED ? nbytes - from : CACHED;
    total += zo_cpu_checksum(data + from, size, begin + from);
    for (uint64_t done = 0; done < size;) {
      const ssize_t n = pwrite(fd, data + from + done, size - done, (off_t)(at + from + done));
      if (n < 0 && errno != EINTR) return -(int64_t)errno;
      if (n > 0) done += (uint64_t)n;
    }
  }
  *sum = total;
  return (int64_t)nbytes;
}

// ---- pages of a file's mapping --------------------------------------------------------------------------------------

namespace {

const uint64_t AROUND = 64 << 10;  // a fault on a cached page maps what is cached around it: Linux, 64 kB by default

uint64_t page_bytes() {
  static const uint64_t size = (uint64_t)sysconf(_SC_PAGESIZE);
  return size;
}

}  // namespace

#define ZO_PAGES extern "C" __attribute__((visibility("default"))) int

// 1 if all pages of these addresses lie in the page cache, so that no access waits for the medium; else 0.
ZO_PAGES zo_cpu_pages_cached(const unsigned char* data, uint64_t nbytes) {
#if defined(__linux__)
  unsigned char seen[1024];
  const uint64_t page = page_bytes(), end = (uint64_t)data + nbytes;
  for (uint64_t at = (uint64_t)data & ~(page - 1); at < end; at += sizeof seen * page) {
    const uint64_t size = end - at < sizeof seen * page ? end - at : sizeof seen * page;
    if (mincore((void*)at, size, seen) != 0) return 0;
    for (uint64_t i = 0; i < (size + page - 1) / page; ++i)
      if (!(seen[i] & 1)) return 0;
  }
  return 1;
#else
  return 0;
#endif
}

// Into the page tables, so that the threads that compute meet no faults. One read each 64 kB: half the time of
// MADV_POPULATE_READ, which looks at every page.
ZO_PAGES zo_cpu_pages_bring(const unsigned char* data, uint64_t nbytes) {
  const unsigned char* end = data + nbytes;
  for (const unsigned char* at = data; at < end; at = (const unsigned char*)(((uint64_t)at & ~(AROUND - 1)) + AROUND))
    (void)*(const volatile unsigned char*)at;
  return 0;
}

// Out of them: they stay in the page cache and no longer count as this process's. Other bytes of their pages too.
ZO_PAGES zo_cpu_pages_let_go(const unsigned char* data, uint64_t nbytes) {
  const uint64_t start = (uint64_t)data & ~(page_bytes() - 1);
  return madvise((void*)start, (uint64_t)data + nbytes - start, MADV_DONTNEED);
}
