#include "common/page_pool.h"

#include <mutex>
#include <unordered_map>
#include <utility>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ssd_ext::page_pool {
namespace {

constexpr size_t kPage = 4096, kHugePage = 2 << 20;

struct Block {
  void* data = nullptr;
  size_t bytes = 0;
};

struct Pool {
  std::mutex mutex;
  std::unordered_map<void*, size_t> taken;
  Block kept;
};

Pool& pool() {
  static Pool& pool = *new Pool;  // tensors may outlive every static object
  return pool;
}

#if defined(__linux__)

// mmap aligns to small pages: one huge page more is asked for, and what sticks out on both sides is given back.
// A last huge page that would not be full stays in small ones.
Block map(size_t bytes) {
  void* raw = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) return {};
  char* const start = static_cast<char*>(raw);
  const size_t before = (kHugePage - reinterpret_cast<size_t>(start) % kHugePage) % kHugePage;
  if (before > 0) munmap(start, before);
  munmap(start + before + bytes, kHugePage - before);
  madvise(start + before, bytes, MADV_HUGEPAGE);  // a wish: without it the pages are small
  return {start + before, bytes};
}

void unmap(const Block& block) {
  if (block.data != nullptr) munmap(block.data, block.bytes);
}

#else

Block map(size_t) { return {}; }
void unmap(const Block&) {}

#endif

}  // namespace

void* take(size_t bytes) {
  const size_t whole = (bytes + kPage - 1) / kPage * kPage;
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  Block block;
  if (p.kept.bytes >= whole && p.kept.bytes / 2 <= whole) {
    block = std::exchange(p.kept, {});
  } else {
    block = map(whole);
  }
  if (block.data != nullptr) p.taken[block.data] = block.bytes;
  return block.data;
}

void give_back(void* data) {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  const auto found = p.taken.find(data);
  unmap(std::exchange(p.kept, {data, found->second}));
  p.taken.erase(found);
}

size_t kept() {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  return p.kept.bytes;
}

size_t release() {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  const Block block = std::exchange(p.kept, {});
  unmap(block);
  return block.bytes;
}

}  // namespace ssd_ext::page_pool
