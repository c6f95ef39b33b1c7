#pragma once
// A stack with a function running on it, to and from which control can be switched.
#include <cstddef>

#if !defined(__x86_64__)
#define SSD_EXT_EMULATOR_UCONTEXT  // may be defined on x86-64 too, to try it
#endif
#if defined(SSD_EXT_EMULATOR_UCONTEXT)
#include <ucontext.h>
#endif

namespace emulator {

class Context {
 public:
  // Makes this context begin in entry(), which must never return, on the given stack.
  void start(void* stack, std::size_t bytes, void (*entry)());

  // Leaves `from`, the running context, and goes on in `to`.
  static void change(Context& from, Context& to);

 private:
#if !defined(SSD_EXT_EMULATOR_UCONTEXT)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
};

}  // namespace emulator
