#include "visibility.h"

#include <algorithm>
#include <map>
#include <unordered_map>
#include <utility>
#include <vector>

#include "scheduler.h"

namespace emulator::visibility {
namespace {

// What precedes a fence of a block has been released.
struct Release {
  size_t block;  // its index in block_epochs
  Moment fence;

  bool covers(const Moment& write) const {
    if (write.epoch != fence.epoch) return write.epoch < fence.epoch;
    if (write.thread == fence.thread) return write.fences < fence.fences;
    return write.thread / kWarp == fence.thread / kWarp && write.warp_epoch < fence.warp_epoch;
  }
};

// A release that a thread of the running block has acquired.
struct Acquired {
  Release release;
  Moment fence;
  bool by_block;  // a barrier has been passed since

  bool holds_for(const Moment& now) const {
    if (by_block || now.thread == fence.thread) return true;
    return now.thread / kWarp == fence.thread / kWarp && fence.warp_epoch < now.warp_epoch;
  }
};

std::vector<uint32_t> block_epochs;                              // with which the blocks of this launch began
std::unordered_map<const void*, std::vector<Release>> releases;  // by the word of the atomic operation

// Of the running block.
std::map<uint16_t, Moment> fences;                                        // the last one of each thread
std::map<uint16_t, std::vector<std::pair<const void*, size_t>>> pending;  // words read atomically, not yet fenced
std::map<std::pair<uint16_t, const void*>, size_t> taken;                 // how many releases a thread has acquired
std::map<size_t, std::vector<Acquired>> acquired;                         // by the block that released

size_t block_of(uint32_t epoch) {
  return size_t(std::upper_bound(block_epochs.begin(), block_epochs.end(), epoch) - block_epochs.begin()) - 1;
}

}  // namespace

void begin_launch() {
  block_epochs.clear();
  releases.clear();
}

void begin_block(uint32_t epoch) {
  block_epochs.push_back(epoch);
  fences.clear();
  pending.clear();
  taken.clear();
  acquired.clear();
}

void block_barrier() {
  for (auto& [block, all] : acquired)
    for (Acquired& a : all) a.by_block = true;
}

void fence(const Moment& now) {
  fences[now.thread] = now;
  for (const auto& [word, count] : pending[now.thread]) {
    size_t& first = taken[{now.thread, word}];
    for (; first < count; ++first) {
      const Release& r = releases[word][first];
      acquired[r.block].push_back({r, now, false});
    }
  }
  pending.erase(now.thread);
}

void atomic(const void* address, const Moment& now) {
  if (const auto there = releases.find(address); there != releases.end())
    pending[now.thread].emplace_back(address, there->second.size());
  const auto last = fences.find(now.thread);
  if (last == fences.end()) return;
  std::vector<Release>& here = releases[address];
  here.push_back({block_epochs.size() - 1, last->second});
  for (const auto& [block, all] : acquired) {  // what it has learned of others it passes on
    for (const Acquired& a : all)
      if (a.holds_for(last->second)) here.push_back(a.release);
  }
}

bool is_visible(const Moment& write, const Moment& now) {
  const auto all = acquired.find(block_of(write.epoch));
  return all != acquired.end() && std::any_of(all->second.begin(), all->second.end(), [&](const Acquired& a) {
           return a.holds_for(now) && a.release.covers(write);
         });
}

}  // namespace emulator::visibility
