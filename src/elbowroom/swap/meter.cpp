// A CPU allocator for PyTorch that counts what is held, refuses beyond a budget, and keeps a log.
//
// Memory itself comes from PyTorch's own functions, so alignment and options stay as they are. All
// functions at the end are called from Python with ctypes. Blocks that other allocators made are
// never seen here: what they hold is not counted, nor is its release.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/util/Exception.h>

#include <atomic>
#include <cstdint>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace {

struct Entry {
  int64_t bytes;    // added to what is held; negative for a release, 0 for a mark
  int64_t address;  // of the block; 0 for a mark
};

std::atomic<int64_t> held{0}, peak{0}, budget{-1}, num_refused{0};
std::atomic<bool> is_logging{false};

std::mutex log_lock;
std::vector<Entry> entries;

struct Block {
  int64_t bytes;
  int64_t number;  // in the order of allocations, from 1
};

std::mutex blocks_lock;
std::unordered_map<void*, Block> blocks;
int64_t num_allocated = 0;

const c10::Device cpu(c10::DeviceType::CPU);

void note(int64_t bytes, void* block) {
  if (!is_logging.load(std::memory_order_relaxed)) return;
  std::lock_guard<std::mutex> guard(log_lock);
  entries.push_back({bytes, reinterpret_cast<int64_t>(block)});
}

void release(void* block) {
  if (block == nullptr) return;
  int64_t bytes = 0;
  {
    std::lock_guard<std::mutex> guard(blocks_lock);
    auto found = blocks.find(block);
    if (found != blocks.end()) {
      bytes = found->second.bytes;
      blocks.erase(found);
    }
  }
  if (bytes > 0) {
    held -= bytes;
    note(-bytes, block);
    c10::reportMemoryUsageToProfiler(block, -bytes, held, 0, cpu);
  }
  c10::free_cpu(block);
}

// Adds `bytes` to what is held, or throws and adds nothing. Returns what is then held.
int64_t reserve(int64_t bytes) {
  const int64_t now = held.fetch_add(bytes) + bytes;
  const int64_t limit = budget.load();
  if (limit >= 0 && now > limit) {
    held -= bytes;
    num_refused++;
    TORCH_CHECK_WITH(
        OutOfMemoryError, false, "the memory budget leaves ", limit, " bytes: ", now - bytes,
        " are held, and ", bytes, " more were asked for");
  }
  int64_t seen = peak.load();
  while (now > seen && !peak.compare_exchange_weak(seen, now)) {
  }
  return now;
}

struct Meter final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    if (size == 0) return {nullptr, nullptr, &release, cpu};
    const auto bytes = static_cast<int64_t>(size);
    const int64_t now = reserve(bytes);
    void* block = nullptr;
    try {
      block = c10::alloc_cpu(size);
    } catch (...) {
      held -= bytes;
      throw;
    }
    {
      std::lock_guard<std::mutex> guard(blocks_lock);
      blocks[block] = {bytes, ++num_allocated};
    }
    note(bytes, block);
    c10::reportMemoryUsageToProfiler(block, bytes, now, 0, cpu);
    // oneDNN needs the context to be the block itself, and a raw deleter.
    return {block, block, &release, cpu};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t count) const override {
    default_copy_data(to, from, count);
  }
};

Meter meter;

}  // namespace

extern "C" {

void meter_install() { c10::SetCPUAllocator(&meter, /*priority=*/10); }

int64_t meter_held() { return held; }
int64_t meter_peak() { return peak; }
void meter_reset_peak() { peak = held.load(); }

// Negative: no budget.
void meter_set_budget(int64_t bytes) { budget = bytes; }
int64_t meter_num_refused() { return num_refused; }

// Bytes of the block at this address; 0 if another allocator made it.
int64_t meter_block_bytes(int64_t address) {
  std::lock_guard<std::mutex> guard(blocks_lock);
  auto found = blocks.find(reinterpret_cast<void*>(address));
  return found == blocks.end() ? 0 : found->second.bytes;
}

// Number of the block at this address, in the order of allocations; 0 as above.
int64_t meter_block_number(int64_t address) {
  std::lock_guard<std::mutex> guard(blocks_lock);
  auto found = blocks.find(reinterpret_cast<void*>(address));
  return found == blocks.end() ? 0 : found->second.number;
}

int64_t meter_num_allocated() {
  std::lock_guard<std::mutex> guard(blocks_lock);
  return num_allocated;
}

void meter_start_log() {
  std::lock_guard<std::mutex> guard(log_lock);
  entries.clear();
  is_logging = true;
}

void meter_stop_log() { is_logging = false; }

// Appends an entry that changes nothing. Returns its position.
int64_t meter_mark() {
  std::lock_guard<std::mutex> guard(log_lock);
  entries.push_back({0, 0});
  return static_cast<int64_t>(entries.size()) - 1;
}

int64_t meter_num_entries() {
  std::lock_guard<std::mutex> guard(log_lock);
  return static_cast<int64_t>(entries.size());
}

// Writes bytes and address of `count` entries from `begin` on, in turn.
void meter_read_log(int64_t* out, int64_t begin, int64_t count) {
  std::lock_guard<std::mutex> guard(log_lock);
  for (int64_t k = 0; k < count; k++) {
    out[2 * k] = entries[begin + k].bytes;
    out[2 * k + 1] = entries[begin + k].address;
  }
}
}
