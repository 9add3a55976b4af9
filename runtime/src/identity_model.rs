//! ONNX models of one operator, `y = Identity(x)`: for probing a provider and for copies to a device. They are written
//! out as bytes because nothing else in the runtime writes ONNX.

/// IR version 9, opset 20, graph `g`, `x` and `y` float32 `[1]`.
pub(crate) const FLOAT32: &[u8] =
    b"\x08\t:7\n\x10\n\x01x\x12\x01y\"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\
    \x04\n\x02\x08\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x14";

/// IR version 9, opset 20, graph `g`, `x` and `y` uint8 `[n]`.
pub(crate) const UINT8: &[u8] =
    b"\x08\t:9\n\x10\n\x01x\x12\x01y\"\x08Identity\x12\x01gZ\x10\n\x01x\x12\x0b\n\t\x08\x02\x12\x05\n\x03\x12\x01n\
    b\x10\n\x01y\x12\x0b\n\t\x08\x02\x12\x05\n\x03\x12\x01nB\x04\n\x00\x10\x14";
