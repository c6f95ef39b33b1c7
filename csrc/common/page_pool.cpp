#include "common/page_pool.h"

#include <algorithm>
#include <mutex>
#include <unordered_map>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace ssd_ext::page_pool {
namespace {

constexpr size_t kHugePage = 2 << 20;
constexpr size_t kMostKept = 2;  // gradients of logits and deltas

struct Block {
  void* data = nullptr;
  size_t bytes = 0;
};

struct Pool {
  std::mutex mutex;
  std::unordered_map<void*, size_t> taken;
  std::vector<Block> kept;  // the oldest first
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

void unmap(const Block& block) { munmap(block.data, block.bytes); }

size_t page_size() { return sysconf(_SC_PAGESIZE); }

#else

Block map(size_t) { return {}; }
void unmap(const Block&) {}
size_t page_size() { return 4096; }

#endif

}  // namespace

void* take(size_t bytes) {
  const size_t page = page_size(), whole = (bytes + page - 1) / page * page;
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  const auto fits = [&](const Block& block) { return block.bytes >= whole && block.bytes / 2 <= whole; };
  const auto found = std::find_if(p.kept.begin(), p.kept.end(), fits);
  Block block;
  if (found != p.kept.end()) {
    block = *found;
    p.kept.erase(found);
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
  p.kept.push_back({data, found->second});
  p.taken.erase(found);
  if (p.kept.size() <= kMostKept) return;
  unmap(p.kept.front());
  p.kept.erase(p.kept.begin());
}

size_t kept() {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  size_t bytes = 0;
  for (const Block& block : p.kept) bytes += block.bytes;
  return bytes;
}

size_t release() {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  size_t bytes = 0;
  for (const Block& block : p.kept) {
    unmap(block);
    bytes += block.bytes;
  }
  p.kept.clear();
  return bytes;
}

}  // namespace ssd_ext::page_pool
