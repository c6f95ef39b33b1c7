#pragma once
// Large blocks of CPU memory in huge pages, of which the last two given back are kept for whoever comes next.
//
// glibc maps every block of this size afresh, and its first touches then take longer than the work: those of a
// gradient of 90 MB 22 to 47 ms in pages of 4 KB and 4 to 9 in huge ones, where all the rest of the loss takes 7.
#include <cstddef>

namespace ssd_ext::page_pool {

constexpr size_t kLeastBytes = 8 << 20;  // smaller blocks do not pay

void* take(size_t bytes);  // contents are undefined; nullptr where there is no such memory
void give_back(void* block);
size_t kept();     // bytes that nobody uses
size_t release();  // gives those to the system, and tells how many they were

}  // namespace ssd_ext::page_pool
