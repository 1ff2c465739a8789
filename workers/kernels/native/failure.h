// How anything inside the kernel refuses: a status and a sentence. api.cpp turns it into a return
// value; it never leaves the library, and never a PE's thread.
#pragma once

#include <string>
#include <utility>

#include "api.h"

namespace furiosa {

struct Failure {
  FsStatus status;
  std::string message;
};

inline void require(bool holds, FsStatus status, const char* message) {
  if (!holds) throw Failure{status, message};
}

}  // namespace furiosa
