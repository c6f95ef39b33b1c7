#include "context.h"

namespace emulator {

#if !defined(SSD_EXT_EMULATOR_UCONTEXT)

// swapcontext() makes two system calls; this makes none. Saved are the registers that a call must
// preserve, the return address lying above them.
extern "C" void ssd_ext_change_stack(void** save, void* load);
asm(R"(
  .text
  .globl ssd_ext_change_stack
  .hidden ssd_ext_change_stack
  .type ssd_ext_change_stack, @function
ssd_ext_change_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size ssd_ext_change_stack, .-ssd_ext_change_stack
)");

void Context::start(void* stack, std::size_t bytes, void (*entry)()) {
  void** top = reinterpret_cast<void**>(static_cast<char*>(stack) + bytes);
  constexpr int kSaved = 6;
  *--top = nullptr;  // where a return address would lie: a function is entered 8 bytes off 16
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kSaved; ++i) *--top = nullptr;
  stack_pointer_ = top;
}

void Context::change(Context& from, Context& to) { ssd_ext_change_stack(&from.stack_pointer_, to.stack_pointer_); }

#else

void Context::start(void* stack, std::size_t bytes, void (*entry)()) {
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack;
  context_.uc_stack.ss_size = bytes;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
}

void Context::change(Context& from, Context& to) { swapcontext(&from.context_, &to.context_); }

#endif

}  // namespace emulator
