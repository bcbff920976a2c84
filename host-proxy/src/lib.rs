//! pvgpu-host-proxy
