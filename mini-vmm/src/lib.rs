//! pvgpu-mini-vmm
