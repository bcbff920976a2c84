//! pvgpu-guest-driver
