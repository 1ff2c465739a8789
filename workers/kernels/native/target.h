// BEGIN_TARGET("avx2,fma") ... END_TARGET: the functions between them may use these instructions.
//
// One set of flags compiles every file, so no baseline code can pick them up by accident. Standard
// headers must be included before it: an inline function of theirs compiled for a newer CPU could
// be the copy that the linker keeps for all.
#pragma once

#define FS_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define BEGIN_TARGET(isa) \
  FS_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define END_TARGET FS_PRAGMA(clang attribute pop)
#else
#define BEGIN_TARGET(isa) FS_PRAGMA(GCC push_options) FS_PRAGMA(GCC target(isa))
#define END_TARGET FS_PRAGMA(GCC pop_options)
#endif
