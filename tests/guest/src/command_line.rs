//! The kernel command line: words separated by spaces, most of them `key=value`.

/// The command line that the guest was started with.
#[derive(Debug, Clone, Copy)]
pub struct CommandLine(pub &'static str);

/// What a `virtio_mmio.device=SIZE@ADDRESS:IRQ` says (Linux, `Documentation/admin-guide/kernel-parameters.txt`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VirtioMmioDevice {
    /// Size of the register window in bytes.
    pub size: u64,
    /// Guest-physical address of its registers.
    pub address: u64,
    /// Global system interrupt.
    pub irq: u8,
}

impl CommandLine {
    /// The values of every `key=value` with this key, in order.
    pub fn values(self, key: &str) -> impl Iterator<Item = &'static str> {
        self.0.split_ascii_whitespace().filter_map(move |word| {
            word.split_once('=')
                .filter(|(name, _)| *name == key)
                .map(|(_, value)| value)
        })
    }

    /// The value of the last `key=value`, as Linux does it: later words override.
    pub fn get(self, key: &str) -> Option<&'static str> {
        self.values(key).last()
    }

    /// The number after `key=`, decimal or 0x, with an optional suffix K, M or G; nothing when absent or malformed.
    pub fn number(self, key: &str) -> Option<u64> {
        parse_number(self.get(key)?)
    }

    /// The virtio-mmio devices that the command line announces.
    pub fn virtio_mmio_devices(self) -> impl Iterator<Item = VirtioMmioDevice> {
        self.values("virtio_mmio.device")
            .filter_map(parse_virtio_mmio)
    }
}

fn parse_virtio_mmio(value: &str) -> Option<VirtioMmioDevice> {
    let (size, rest) = value.split_once('@')?;
    let mut parts = rest.split(':');
    Some(VirtioMmioDevice {
        size: parse_number(size)?,
        address: parse_number(parts.next()?)?,
        irq: parts.next()?.parse().ok()?,
    })
}

fn parse_number(text: &str) -> Option<u64> {
    let (digits, shift) = match text.as_bytes().last()? {
        b'K' | b'k' => (&text[..text.len() - 1], 10),
        b'M' | b'm' => (&text[..text.len() - 1], 20),
        b'G' | b'g' => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let number = match digits.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => digits.parse(),
    };
    number.ok()?.checked_mul(1 << shift)
}
