//! Header values of AMQP 0-9-1 and RabbitMQ: their encoding, and the JSON that qconsume must make of them.

use arbitrary::Arbitrary;
use serde_json::Value;

/// A short string: 255 bytes at most.
#[derive(Arbitrary, Clone, Debug)]
pub enum Name {
    Known(Known),
    Text(String),
}

/// Names with a meaning to qconsume, or, as environment variables, to other programs.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Known {
    Acquired,
    Delivered,
    Traceparent,
    Tracestate,
    Baggage,
    Preload,
    Path,
}

impl Name {
    pub fn text(&self) -> &str {
        match self {
            Self::Known(Known::Acquired) => "x-acquired-count",
            Self::Known(Known::Delivered) => "x-delivery-count",
            Self::Known(Known::Traceparent) => "traceparent",
            Self::Known(Known::Tracestate) => "tracestate",
            Self::Known(Known::Baggage) => "baggage",
            Self::Known(Known::Preload) => "LD_PRELOAD",
            Self::Known(Known::Path) => "PATH",
            Self::Text(text) => &text[..text.floor_char_boundary(255)],
        }
    }

    pub fn encoded(&self) -> Vec<u8> {
        let text = self.text();
        [&[text.len() as u8], text.as_bytes()].concat()
    }
}

/// Arbitrary bytes, perhaps many.
#[derive(Arbitrary, Clone, Debug)]
pub struct Bytes {
    bytes: Vec<u8>,
    repeated: Option<(u8, u16)>,
}

impl Bytes {
    pub fn bytes(&self) -> Vec<u8> {
        let (byte, count) = self.repeated.unwrap_or_default();
        [&self.bytes[..], &vec![byte; count.into()]].concat()
    }
}

#[derive(Arbitrary, Clone, Debug)]
pub enum Field {
    Boolean(bool),
    I8(i8),
    U8(u8),
    I16(i16),
    U16(u16),
    I32(i32),
    U32(u32),
    I64(i64),
    F32(f32),
    F64(f64),
    Decimal(u8, u32),
    Time(u64),
    Text(Bytes),
    Bytes(Bytes),
    Array(Vec<Field>),
    Table(Table),
    Void,
}

/// A table. If it has several fields of one name, the last one counts.
#[derive(Arbitrary, Clone, Debug)]
pub struct Table(pub Vec<(Name, Field)>);

impl Table {
    pub fn get(&self, name: &str) -> Option<&Field> {
        let mut fields = self.0.iter().rev();
        fields.find(|(known, _)| known.text() == name).map(|(_, field)| field)
    }

    /// How deep tables and arrays are nested, this one included.
    pub fn depth(&self) -> usize {
        1 + self.0.iter().map(|(_, field)| field.depth()).max().unwrap_or(0)
    }

    pub fn encoded(&self) -> Vec<u8> {
        let fields = self.0.iter();
        sized(fields.flat_map(|(name, field)| [name.encoded(), field.encoded()].concat()).collect())
    }

    /// Whether the JSON value is this table.
    pub fn is(&self, json: &Value) -> bool {
        let Value::Object(found) = json else {
            return false;
        };
        let is_there = |(name, _): &(Name, Field)| found.contains_key(name.text());
        let mut found_here = found.iter();
        self.0.iter().all(is_there) && found_here.all(|(name, json)| self.get(name).is_some_and(|field| field.is(json)))
    }
}

impl Field {
    /// The value, if it is a whole number from 0, of any type.
    pub fn count(&self) -> Option<u64> {
        match *self {
            Self::I8(n) => n.try_into().ok(),
            Self::U8(n) => Some(n.into()),
            Self::I16(n) => n.try_into().ok(),
            Self::U16(n) => Some(n.into()),
            Self::I32(n) => n.try_into().ok(),
            Self::U32(n) => Some(n.into()),
            Self::I64(n) => n.try_into().ok(),
            // A time is signed.
            Self::Time(n) => n.cast_signed().try_into().ok(),
            _ => None,
        }
    }

    fn depth(&self) -> usize {
        match self {
            Self::Array(fields) => 1 + fields.iter().map(Self::depth).max().unwrap_or(0),
            Self::Table(table) => table.depth(),
            _ => 0,
        }
    }

    fn encoded(&self) -> Vec<u8> {
        let (kind, value) = match self {
            Self::Boolean(value) => (b't', vec![u8::from(*value)]),
            Self::I8(value) => (b'b', value.to_be_bytes().to_vec()),
            Self::U8(value) => (b'B', vec![*value]),
            Self::I16(value) => (b's', value.to_be_bytes().to_vec()),
            Self::U16(value) => (b'u', value.to_be_bytes().to_vec()),
            Self::I32(value) => (b'I', value.to_be_bytes().to_vec()),
            Self::U32(value) => (b'i', value.to_be_bytes().to_vec()),
            Self::I64(value) => (b'l', value.to_be_bytes().to_vec()),
            Self::F32(value) => (b'f', value.to_be_bytes().to_vec()),
            Self::F64(value) => (b'd', value.to_be_bytes().to_vec()),
            Self::Decimal(scale, value) => (b'D', [&[*scale][..], &value.to_be_bytes()].concat()),
            Self::Time(value) => (b'T', value.to_be_bytes().to_vec()),
            Self::Text(text) => (b'S', sized(text.bytes())),
            Self::Bytes(bytes) => (b'x', sized(bytes.bytes())),
            Self::Array(fields) => (b'A', sized(fields.iter().flat_map(Self::encoded).collect())),
            Self::Table(table) => (b'F', table.encoded()),
            Self::Void => (b'V', Vec::new()),
        };
        [vec![kind], value].concat()
    }

    fn is(&self, json: &Value) -> bool {
        // JSON has no infinity (it is null), and serde_json may be wrong in a number's last digit.
        let near = |value: f64| match json.as_f64() {
            Some(found) => (found - value).abs() <= value.abs() * 1e-15,
            None => json.is_null() && !value.is_finite(),
        };
        match self {
            Self::Boolean(value) => json == value,
            Self::I8(value) => json == value,
            Self::U8(value) => json == value,
            Self::I16(value) => json == value,
            Self::U16(value) => json == value,
            Self::I32(value) => json == value,
            Self::U32(value) => json == value,
            Self::I64(value) => json == value,
            Self::Time(value) => *json == value.cast_signed(),
            Self::F32(value) => near((*value).into()),
            Self::F64(value) => near(*value),
            Self::Decimal(scale, value) => {
                let digits = json.as_str().map(|text| text.replacen('.', "", 1));
                let point = json.as_str().and_then(|text| Some(text.len() - 1 - text.find('.')?));
                digits.and_then(|digits| digits.parse().ok()) == Some(value.cast_signed())
                    && point.unwrap_or(0) == usize::from(*scale)
            }
            Self::Text(bytes) | Self::Bytes(bytes) => json == String::from_utf8_lossy(&bytes.bytes()).as_ref(),
            Self::Array(fields) => json.as_array().is_some_and(|found| {
                found.len() == fields.len() && fields.iter().zip(found).all(|(field, found)| field.is(found))
            }),
            Self::Table(table) => table.is(json),
            Self::Void => json.is_null(),
        }
    }
}

/// Puts the size before the bytes.
fn sized(bytes: Vec<u8>) -> Vec<u8> {
    [&(bytes.len() as u32).to_be_bytes()[..], &bytes].concat()
}
