//! Files that `torch.save` wrote, read without running anything in them.
//!
//! Such a file is a zip archive, stored without compression: `NAME/data.pkl`, a pickle that
//! describes the tensors, and `NAME/data/KEY`, their bytes. A pickle is a program that may call
//! anything; this reader knows the dozen instructions that a dictionary of plain tensors is made
//! of, four names they may refer to, and refuses the file at the first other thing.

use crate::dtype::Dtype;
use crate::source::RawTensor;
use std::collections::BTreeMap;
use std::rc::Rc;

/// Largest description that is read.
const MAX_PICKLE: usize = 64 << 20;
/// Deepest nesting of tuples.
const MAX_DEPTH: u8 = 8;

type Result<T> = std::result::Result<T, String>;

/// The tensors in a file, by name.
///
/// # Errors
/// Says why the file is refused.
pub(crate) fn tensors(bytes: &[u8]) -> Result<BTreeMap<String, RawTensor>> {
    let entries = crate::zip::entries(bytes)?;
    let (name, pickle) = entries
        .iter()
        .find(|(name, _)| name.ends_with("/data.pkl"))
        .ok_or("it is not a file that torch.save wrote: it has no data.pkl")?;
    let prefix = name.strip_suffix("data.pkl").unwrap_or_default();
    if let Some(range) = entries.get(&format!("{prefix}byteorder"))
        && bytes.get(range[0]..range[1]) != Some(b"little".as_slice())
    {
        return Err("its bytes are not little-endian".to_string());
    }
    let described = bytes.get(pickle[0]..pickle[1]).ok_or("data.pkl lies outside of the file")?;
    if described.len() > MAX_PICKLE {
        return Err(format!("data.pkl is over {MAX_PICKLE} bytes"));
    }
    let mut tensors = BTreeMap::new();
    for (name, tensor) in Machine::new(described).run()? {
        let storage = entries
            .get(&format!("{prefix}data/{}", tensor.key))
            .ok_or_else(|| format!("{name}: its data/{} is missing", tensor.key))?;
        let raw = tensor.locate(*storage).map_err(|reason| format!("{name}: {reason}"))?;
        tensors.insert(name, raw);
    }
    Ok(tensors)
}

/// A tensor as the pickle describes it.
#[derive(Clone, Debug)]
struct Described {
    dtype: Dtype,
    key: String,
    offset: u64,
    shape: Vec<u64>,
    strides: Vec<u64>,
}

impl Described {
    /// Its bytes in the file, given those of its storage.
    fn locate(&self, storage: [usize; 2]) -> Result<RawTensor> {
        let mut stride = 1u64;
        for (size, found) in self.shape.iter().zip(&self.strides).rev() {
            if *size != 1 && *found != stride {
                return Err("its elements are not in row-major order".to_string());
            }
            stride = stride.checked_mul(*size).ok_or("its shape is too large")?;
        }
        let size = self.dtype.size() as u64;
        let start = self.offset.checked_mul(size);
        let end = self.offset.checked_add(stride).and_then(|end| end.checked_mul(size));
        let available = (storage[1] - storage[0]) as u64;
        match (start, end) {
            (Some(start), Some(end)) if end <= available => Ok(RawTensor {
                shape: self.shape.clone(),
                dtype: self.dtype,
                range: [storage[0] + start as usize, storage[0] + end as usize],
            }),
            _ => Err(format!("shape {:?} is not in a storage of {available} bytes", self.shape)),
        }
    }
}

/// What the machine's stack holds.
#[derive(Clone, Debug)]
enum Value {
    Mark,
    Nothing,
    Flag,
    Int(i64),
    Text(Rc<str>),
    Tuple(Rc<[Value]>, u8),
    /// A dictionary; only the outermost one is looked into.
    Dict,
    RebuildTensor,
    RebuildParameter,
    OrderedDict,
    StorageType(Dtype),
    Storage(Dtype, Rc<str>),
    Tensor(Rc<Described>),
}

struct Machine<'a> {
    code: &'a [u8],
    stack: Vec<Value>,
    memo: BTreeMap<u32, Value>,
    tensors: BTreeMap<String, Described>,
}

impl<'a> Machine<'a> {
    fn new(code: &'a [u8]) -> Machine<'a> {
        Machine { code, stack: Vec::new(), memo: BTreeMap::new(), tensors: BTreeMap::new() }
    }

    /// Every tensor that was put in a dictionary under a name.
    fn run(mut self) -> Result<BTreeMap<String, Described>> {
        loop {
            let code = self.take::<1>()?[0];
            match code {
                b'.' => break,
                0x80 => drop(self.take::<1>()?),
                b'(' => self.stack.push(Value::Mark),
                b'N' => self.stack.push(Value::Nothing),
                0x88 | 0x89 => self.stack.push(Value::Flag),
                b'}' => self.stack.push(Value::Dict),
                b'J' | b'K' | b'M' | 0x8a => self.integer(code)?,
                b'X' | 0x8c => self.text(code)?,
                b'q' | b'r' | b'h' | b'j' | 0x94 => self.memo(code)?,
                b'c' => self.global()?,
                b')' | b't' | 0x85 | 0x86 | 0x87 => self.tuple(code)?,
                b'Q' => self.storage()?,
                b'R' => self.reduce()?,
                b's' | b'u' => self.set_items(code)?,
                b'b' => self.build()?,
                other => {
                    return Err(format!(
                        "its pickle has the instruction {other:#04x}, which tensors do not need"
                    ));
                }
            }
        }
        Ok(self.tensors)
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N]> {
        let (head, rest) = self.code.split_first_chunk::<N>().ok_or("its pickle is cut off")?;
        self.code = rest;
        Ok(*head)
    }

    fn pop(&mut self) -> Result<Value> {
        self.stack.pop().ok_or_else(|| "its pickle takes more than it has".to_string())
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Value>> {
        let mark = self.stack.iter().rposition(|value| matches!(value, Value::Mark));
        let mark = mark.ok_or("its pickle lacks a mark")?;
        let values = self.stack.split_off(mark + 1);
        self.stack.pop();
        Ok(values)
    }

    fn integer(&mut self, code: u8) -> Result<()> {
        let value = match code {
            b'J' => i64::from(i32::from_le_bytes(self.take()?)),
            b'K' => i64::from(self.take::<1>()?[0]),
            b'M' => i64::from(u16::from_le_bytes(self.take()?)),
            _ => {
                let length = self.take::<1>()?[0];
                if length > 8 {
                    return Err(format!("its pickle has an integer of {length} bytes"));
                }
                let mut bytes = [0; 8];
                for byte in bytes.iter_mut().take(usize::from(length)) {
                    *byte = self.take::<1>()?[0];
                }
                if length > 0 && bytes[usize::from(length) - 1] >= 0x80 {
                    bytes[usize::from(length)..].fill(0xff);
                }
                i64::from_le_bytes(bytes)
            }
        };
        self.stack.push(Value::Int(value));
        Ok(())
    }

    fn text(&mut self, code: u8) -> Result<()> {
        let length = match code {
            b'X' => u32::from_le_bytes(self.take()?) as usize,
            _ => usize::from(self.take::<1>()?[0]),
        };
        let (text, rest) = self.code.split_at_checked(length).ok_or("its pickle is cut off")?;
        self.code = rest;
        let text =
            std::str::from_utf8(text).map_err(|_| "its pickle has a text that is not UTF-8")?;
        self.stack.push(Value::Text(text.into()));
        Ok(())
    }

    fn memo(&mut self, code: u8) -> Result<()> {
        let slot = match code {
            b'q' | b'h' => u32::from(self.take::<1>()?[0]),
            0x94 => self.memo.len() as u32,
            _ => u32::from_le_bytes(self.take()?),
        };
        if matches!(code, b'h' | b'j') {
            let value = self.memo.get(&slot).cloned();
            self.stack.push(value.ok_or("its pickle recalls what it did not keep")?);
        } else {
            let value =
                self.stack.last().cloned().ok_or("its pickle keeps what it does not have")?;
            self.memo.insert(slot, value);
        }
        Ok(())
    }

    fn line(&mut self) -> Result<&'a str> {
        let end = self.code.iter().take(256).position(|byte| *byte == b'\n');
        let (line, rest) = self.code.split_at(end.ok_or("its pickle has a name without end")?);
        self.code = &rest[1..];
        std::str::from_utf8(line).map_err(|_| "its pickle has a name that is not UTF-8".to_string())
    }

    /// The few names a pickle of tensors needs; nothing is imported or called.
    fn global(&mut self) -> Result<()> {
        let (module, name) = (self.line()?, self.line()?);
        self.stack.push(match (module, name) {
            ("collections", "OrderedDict") => Value::OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2") => Value::RebuildTensor,
            ("torch._utils", "_rebuild_parameter") => Value::RebuildParameter,
            ("torch", "BFloat16Storage") => Value::StorageType(Dtype::Bf16),
            ("torch", "HalfStorage") => Value::StorageType(Dtype::F16),
            ("torch", "FloatStorage") => Value::StorageType(Dtype::F32),
            ("torch", "DoubleStorage") => Value::StorageType(Dtype::F64),
            ("torch", "LongStorage") => Value::StorageType(Dtype::I64),
            ("torch", "ByteStorage") => Value::StorageType(Dtype::U8),
            _ => return Err(format!("its pickle refers to {module}.{name}, which is not allowed")),
        });
        Ok(())
    }

    fn tuple(&mut self, code: u8) -> Result<()> {
        let count = match code {
            b')' => 0,
            b't' => usize::MAX,
            code => usize::from(code - 0x84),
        };
        let values = if count == usize::MAX {
            self.pop_to_mark()?
        } else {
            let at = self.stack.len().checked_sub(count);
            self.stack.split_off(at.ok_or("its pickle takes more than it has")?)
        };
        let depth =
            values.iter().map(|value| if let Value::Tuple(_, depth) = value { *depth } else { 0 });
        let depth = depth.max().unwrap_or(0) + 1;
        if depth > MAX_DEPTH {
            return Err(format!("its pickle nests tuples more than {MAX_DEPTH} deep"));
        }
        self.stack.push(Value::Tuple(values.into(), depth));
        Ok(())
    }

    /// `('storage', TYPE, KEY, DEVICE, COUNT)` stands for a storage in the archive.
    fn storage(&mut self) -> Result<()> {
        let Value::Tuple(id, _) = self.pop()? else {
            return Err("its pickle names a storage in an unknown way".to_string());
        };
        match &id[..] {
            [
                Value::Text(kind),
                Value::StorageType(dtype),
                Value::Text(key),
                Value::Text(_),
                Value::Int(_),
            ] if &**kind == "storage" => {
                self.stack.push(Value::Storage(*dtype, key.clone()));
                Ok(())
            }
            _ => Err("its pickle names a storage in an unknown way".to_string()),
        }
    }

    /// What Python would call here is only recognized.
    fn reduce(&mut self) -> Result<()> {
        let (arguments, function) = (self.pop()?, self.pop()?);
        let Value::Tuple(arguments, _) = arguments else {
            return Err("its pickle calls something without arguments".to_string());
        };
        let made = match (function, &arguments[..]) {
            (Value::OrderedDict, []) => Value::Dict,
            (Value::RebuildParameter, [tensor @ Value::Tensor(_), ..]) => tensor.clone(),
            (
                Value::RebuildTensor,
                [
                    Value::Storage(dtype, key),
                    Value::Int(offset),
                    Value::Tuple(shape, _),
                    Value::Tuple(strides, _),
                    ..,
                ],
            ) => Value::Tensor(Rc::new(Described {
                dtype: *dtype,
                key: key.to_string(),
                offset: u64::try_from(*offset).map_err(|_| "an offset is negative")?,
                shape: sizes(shape)?,
                strides: sizes(strides)?,
            })),
            _ => return Err("its pickle calls something in an unknown way".to_string()),
        };
        self.stack.push(made);
        Ok(())
    }

    fn set_items(&mut self, code: u8) -> Result<()> {
        let items = if code == b's' {
            let (value, key) = (self.pop()?, self.pop()?);
            vec![key, value]
        } else {
            self.pop_to_mark()?
        };
        if !matches!(self.stack.last(), Some(Value::Dict)) {
            return Err("its pickle puts items in what is not a dictionary".to_string());
        }
        let (pairs, rest) = items.as_chunks::<2>();
        if !rest.is_empty() {
            return Err("its pickle has a key without a value".to_string());
        }
        for [key, value] in pairs {
            match (key, value) {
                (Value::Text(name), Value::Tensor(tensor)) => {
                    self.tensors.insert(name.to_string(), (**tensor).clone());
                }
                // A dictionary of dictionaries of tensors, or a scalar beside them: not looked
                // into.
                (_, Value::Tensor(_)) => return Err("a tensor has no name".to_string()),
                _ => {}
            }
        }
        Ok(())
    }

    /// Attributes of a dictionary (`_metadata` of a state dict) are dropped.
    fn build(&mut self) -> Result<()> {
        self.pop()?;
        match self.stack.last() {
            Some(Value::Dict) => Ok(()),
            _ => Err("its pickle sets attributes of what is not a dictionary".to_string()),
        }
    }
}

fn sizes(values: &[Value]) -> Result<Vec<u64>> {
    if values.len() > crate::boxes::MAX_DIMS {
        return Err(format!("a tensor has {} dimensions", values.len()));
    }
    let size = |value: &Value| match value {
        Value::Int(size) => u64::try_from(*size).map_err(|_| "a size is negative".to_string()),
        _ => Err("a size is not a number".to_string()),
    };
    values.iter().map(size).collect()
}
