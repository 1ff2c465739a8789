// What every function of the C surface runs in.
#pragma once

#include <cstdio>
#include <exception>
#include <new>

#include "api.h"
#include "failure.h"

namespace furiosa {

// Runs `body`; whatever it throws becomes a status and a message.
template <class Body>
int32_t guarded(FsMessage* message, const Body& body) {
  const auto report = [message](FsStatus status, const char* text) {
    std::snprintf(message->text, sizeof message->text, "%s", text);
    return status;
  };
  try {
    body();
    return kOk;
  } catch (const Failure& failure) {
    return report(failure.status, failure.message.c_str());
  } catch (const std::bad_alloc&) {
    return report(kOutOfMemory, "out of memory");
  } catch (const std::exception& error) {
    return report(kInternal, error.what());
  }
}

}  // namespace furiosa
