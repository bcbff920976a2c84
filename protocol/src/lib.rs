//! pvgpu-protocol
