use super::*;

const START: &[u8] = b"\0\x0a\0\x0a\0\x09\0\0\0\x13\x07versionS\0\0\0\x064.3.61\0\0\0\x0ePLAIN AMQPLAIN\0\0\0\x05en_US";
const DELIVER: &[u8] = b"\0\x3c\0\x3c\x01t\0\0\0\0\0\0\0\x01\0\0\x01q";
const RETURN: &[u8] = b"\0\x3c\0\x32\x01\x38\x01x\0\x01q";

fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
    let size = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&[kind, 0, 1][..], &size, payload, &[0xce]].concat()
}

/// A content header with tables (`F`) or arrays (`A`) nested in its headers.
fn nested(levels: usize, kind: u8) -> Vec<u8> {
    let mut value = vec![b'V'];
    for _ in 0..levels {
        let inner = if kind == b'F' { [&[1, b'k'][..], &value].concat() } else { value };
        value = [&[kind][..], &(inner.len() as u32).to_be_bytes(), &inner].concat();
    }
    let table = [&[1, b'h'][..], &value].concat();
    let mut payload = vec![0, 60, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x20, 0];
    payload.extend((table.len() as u32).to_be_bytes());
    payload.extend(table);
    frame(CONTENT_HEADER, &payload)
}

fn observe(frames: &[Vec<u8>], piece: usize) -> (Observed, io::Result<()>) {
    let observed = Arc::default();
    let mut tap = Tap::new(131_072, Arc::clone(&observed));
    let result = frames.concat().chunks(piece).try_for_each(|piece| tap.observe(piece));
    drop(tap);
    let observed = Arc::into_inner(observed).unwrap();
    (observed.into_inner().unwrap(), result)
}

#[test]
fn what_the_broker_says_is_noted_however_it_is_cut() {
    let frames = [
        frame(METHOD, START),
        frame(METHOD, b"\0\x0a\0\x1e\x07\xff\0\x02\0\0\0\x3c"),
        frame(BODY, &[METHOD; 3000]),
        frame(HEARTBEAT, b""),
        frame(METHOD, b"\0\x14\0\x28\x01\xf4\x04oops\0\0\0\0"),
        frame(METHOD, b"\0\x3c\0\x1e\x01t\0"),
    ];
    for piece in [1, 2, 7, 8, 9, 1000, 100_000] {
        let (seen, result) = observe(&frames, piece);
        result.unwrap();
        assert_eq!(seen.version, Some((4, 3)));
        assert_eq!(seen.mechanisms.as_deref(), Some("PLAIN AMQPLAIN"));
        assert_eq!(seen.heartbeat, Some(60));
        let closed = seen.closed.as_ref().unwrap();
        assert_eq!((closed.code, closed.text.as_str()), (500, "oops"));
        assert!(seen.consumer.cancelled && seen.unreadable.is_none(), "{seen:?}");
    }
}

#[test]
fn a_close_is_noted_though_its_text_is_cut_within_a_character() {
    for close in [b"\0\x14\0\x28\x01\x94\x05q\xc3...\0\0\0\0", b"\0\x0a\0\x32\x01\x94\x05q\xc3...\0\0\0\0"] {
        let (seen, result) = observe(&[frame(METHOD, close)], 64);
        result.unwrap();
        let closed = seen.closed.unwrap();
        assert_eq!((closed.code, closed.text.as_str()), (404, "q\u{fffd}..."));
        assert!(seen.closed_unreadably);
    }
    let cut_short = b"\0\x14\0\x28\x01\x94\x05q\xc3";
    let (seen, result) = observe(&[frame(METHOD, cut_short)], 64);
    result.unwrap();
    assert!(seen.closed.is_none() && !seen.closed_unreadably);
}

#[test]
fn a_hundred_levels_are_read_and_no_more() {
    for kind in [b'F', b'A'] {
        let (_, result) = observe(&[frame(METHOD, DELIVER), nested(99, kind)], 64);
        result.unwrap();
        for levels in [102, 1000, 10_000] {
            let (observed, result) = observe(&[frame(METHOD, DELIVER), nested(levels, kind)], 64);
            assert_eq!(result.unwrap_err().kind(), io::ErrorKind::InvalidData);
            let why = observed.unreadable.unwrap();
            assert!(why.contains("nested more than 100 deep"), "{why}");
        }
    }
}

#[test]
fn a_text_full_of_what_looks_like_nesting_is_no_nesting() {
    let text = [&[1, b'h', b'S'][..], &2000_u32.to_be_bytes(), &[b'A'; 2000]].concat();
    let mut payload = vec![0, 60, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x20, 0];
    payload.extend((text.len() as u32).to_be_bytes());
    payload.extend(text);
    let frames = [frame(METHOD, DELIVER), frame(CONTENT_HEADER, &payload)];
    observe(&frames, 64).1.unwrap();
}

#[test]
fn only_a_delivered_message_is_called_unreadable() {
    let (observed, result) = observe(&[frame(METHOD, RETURN), nested(1000, b'F')], 64);
    assert!(result.is_err() && observed.unreadable.is_none());
    let bad_key = b"\0\x3c\0\x3c\x01t\0\0\0\0\0\0\0\x01\0\0\x01\xff";
    let (observed, result) = observe(&[frame(METHOD, bad_key)], 64);
    assert!(result.is_err() && observed.unreadable.is_some());
}

#[test]
fn what_is_too_large_is_refused_and_what_is_not_amqp_is_left_to_lapin() {
    let huge = [&[CONTENT_HEADER, 0, 1][..], &u32::MAX.to_be_bytes()].concat();
    assert!(observe(&[huge], 3).1.is_err());
    let largest = frame(BODY, &[0; FRAME_MAX as usize]);
    observe(&[largest], 1000).1.unwrap();
    let (_, result) = observe(&[frame(BODY, &[0; FRAME_MAX as usize + 1])], 1000);
    let said = "a frame with 131073 bytes of payload, and at most 131072 are read";
    assert_eq!(result.unwrap_err().to_string(), said);
    for foreign in [&b"HTTP/1.1 400 Bad Request"[..], b"AMQP\0\x01\0\0"] {
        observe(&[foreign.to_vec()], 3).1.unwrap();
    }
}

fn content_header(body_size: u64) -> Vec<u8> {
    frame(CONTENT_HEADER, &[&[0, 60, 0, 0][..], &body_size.to_be_bytes(), &[0, 0]].concat())
}

#[test]
fn deliveries_are_counted_and_the_last_ones_flag_is_kept() {
    let again = b"\0\x3c\0\x3c\x01t\0\0\0\0\0\0\0\x02\x01\0\x01q";
    let (observed, _) =
        observe(&[frame(METHOD, DELIVER), content_header(0), frame(METHOD, again), content_header(0)], 64);
    assert_eq!((observed.consumer.deliveries, observed.consumer.redelivered), (2, true));
    let (observed, _) = observe(&[frame(METHOD, again), content_header(0), frame(METHOD, DELIVER)], 64);
    assert_eq!((observed.consumer.deliveries, observed.consumer.redelivered), (2, false));
}

#[test]
fn headers_larger_than_was_agreed_on_are_unreadable() {
    let tune = |max: u32| frame(METHOD, &[&b"\0\x0a\0\x1e\x07\xff"[..], &max.to_be_bytes(), &[0, 60]].concat());
    let payload = [&[0, 60, 0, 0][..], &[0; 8], &[0x20, 0], &9000_u32.to_be_bytes(), &[0; 9000]].concat();
    let large = frame(CONTENT_HEADER, &payload);
    let limits = [(8192, true), (large.len() as u32 - 1, true), (large.len() as u32, false), (0, false)];
    for (theirs, unreadable) in limits {
        let (observed, _) = observe(&[tune(theirs), frame(METHOD, DELIVER), large.clone()], 100);
        let why = observed.unreadable.unwrap_or_default();
        assert_eq!(why.contains("frame_max"), unreadable, "{theirs}: {why}");
    }
    let (observed, _) = observe(&[tune(8192), frame(METHOD, RETURN), large], 100);
    assert!(observed.unreadable.is_none(), "nobody holds it");
}
