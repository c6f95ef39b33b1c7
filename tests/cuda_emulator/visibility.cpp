#include "visibility.h"

#include <algorithm>
#include <map>
#include <set>
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

using Releaser = std::pair<size_t, uint16_t>;  // a block and a thread of it

std::vector<uint32_t> block_epochs;  // with which the blocks of this launch began
// By the word of the atomic operations; of each releaser the last fence, which covers what the earlier ones do.
std::unordered_map<const void*, std::map<Releaser, Moment>> releases;

// Of the running block.
std::map<uint16_t, Moment> fences;                  // the last one of each thread
std::map<uint16_t, std::set<const void*>> pending;  // words that a thread has read atomically since
std::map<size_t, std::vector<Acquired>> acquired;   // by the block that released

size_t block_of(uint32_t epoch) {
  return size_t(std::upper_bound(block_epochs.begin(), block_epochs.end(), epoch) - block_epochs.begin()) - 1;
}

size_t running_block() { return block_epochs.size() - 1; }

void acquire(const Release& release, const Moment& now) {
  std::vector<Acquired>& all = acquired[release.block];
  const bool known = std::any_of(all.begin(), all.end(), [&](const Acquired& a) {
    return (a.by_block || a.fence.thread == now.thread) && a.release.fence == release.fence;
  });
  if (!known) all.push_back({release, now, false});
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
  acquired.clear();
}

void block_barrier() {
  for (auto& [block, all] : acquired)
    for (Acquired& a : all) a.by_block = true;
}

void fence(const Moment& now) {
  fences[now.thread] = now;
  for (const void* word : pending[now.thread]) {
    for (const auto& [releaser, moment] : releases[word])
      if (releaser.first != running_block()) acquire({releaser.first, moment}, now);
  }
  pending.erase(now.thread);
}

void atomic(const void* address, const Moment& now) {
  if (releases.count(address)) pending[now.thread].insert(address);
  const auto last = fences.find(now.thread);
  if (last == fences.end()) return;
  auto& here = releases[address];
  const auto [own, is_first] = here.try_emplace({running_block(), now.thread}, last->second);
  if (!is_first && own->second == last->second) return;
  own->second = last->second;
  for (const auto& [block, all] : acquired) {  // what the thread has learned of others it passes on
    for (const Acquired& a : all) {
      if (!a.holds_for(last->second)) continue;
      Moment& known = here.try_emplace({block, a.release.fence.thread}, a.release.fence).first->second;
      if (known.fences < a.release.fence.fences) known = a.release.fence;
    }
  }
}

bool is_visible(const Moment& write, const Moment& now) {
  const auto all = acquired.find(block_of(write.epoch));
  return all != acquired.end() && std::any_of(all->second.begin(), all->second.end(), [&](const Acquired& a) {
           return a.holds_for(now) && a.release.covers(write);
         });
}

}  // namespace emulator::visibility
