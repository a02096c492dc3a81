// Configures the tile registers of AMX, which hold 16 rows of 64 bytes.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace namernn_fast {
namespace {

// Configures the tile registers of the calling thread. The destructor releases them.
struct AmxRegisters {
  AmxRegisters() {
    struct {
      uint8_t palette = 1;
      uint8_t start_row = 0;
      uint8_t reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } configuration;
    for (int tile = 0; tile < 8; ++tile) {
      configuration.row_bytes[tile] = 64;
      configuration.rows[tile] = 16;
    }
    _tile_loadconfig(&configuration);
  }
  ~AmxRegisters() { _tile_release(); }
  AmxRegisters(const AmxRegisters&) = delete;
  AmxRegisters& operator=(const AmxRegisters&) = delete;
};

}  // namespace
}  // namespace namernn_fast
