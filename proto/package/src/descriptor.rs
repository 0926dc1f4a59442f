//! The names of the services in a `google.protobuf.FileDescriptorSet`, and nothing more of it.
//!
//! Decoding a stranger's descriptor set into its Rust types can take two hundred times its size, since an empty nested
//! message is two bytes on the wire and hundreds in memory. Names are all that is needed here, so this module reads the
//! wire format (<https://protobuf.dev/programming-guides/encoding/>) down to them and skips the rest.

/// `FileDescriptorSet.file`.
const SET_FILE: u64 = 1;
/// `FileDescriptorProto.package`.
const FILE_PACKAGE: u64 = 2;
/// `FileDescriptorProto.service`.
const FILE_SERVICE: u64 = 6;
/// `ServiceDescriptorProto.name`.
const SERVICE_NAME: u64 = 1;
/// `ServiceDescriptorProto.method`.
const SERVICE_METHOD: u64 = 2;
/// `MethodDescriptorProto.name`.
const METHOD_NAME: u64 = 1;

/// The full names of all services, sorted, each once.
///
/// # Errors
///
/// A sentence that says why the bytes are not a descriptor set, or that it has more than `most` services.
pub(crate) fn service_names(bytes: &[u8], most: usize) -> Result<Vec<String>, String> {
    let mut names = Vec::new();
    for file in Fields(bytes) {
        let Some(file) = file?.message(SET_FILE)? else { continue };
        let mut package = "";
        let mut services = Vec::new();
        for field in Fields(file) {
            let field = field?;
            if let Some(text) = field.message(FILE_PACKAGE)? {
                package = utf8(text)?;
            } else if let Some(service) = field.message(FILE_SERVICE)? {
                let mut name = None;
                for field in Fields(service) {
                    if let Some(text) = field?.message(SERVICE_NAME)? {
                        name = Some(utf8(text)?);
                    }
                }
                services.push(name.filter(|name| !name.is_empty()).ok_or("a service has no name")?);
                if names.len() + services.len() > most {
                    return Err(format!("it has more than {most} services"));
                }
            }
        }
        names.extend(services.into_iter().map(|name| match package {
            "" => name.to_owned(),
            package => format!("{package}.{name}"),
        }));
    }
    names.sort();
    names.dedup();
    Ok(names)
}

/// The names of one service's methods, in the order of the file; `None` when the set does not have the service.
///
/// # Errors
///
/// A sentence that says why the bytes are not a descriptor set.
pub fn method_names(bytes: &[u8], service: &str) -> Result<Option<Vec<String>>, String> {
    for file in Fields(bytes) {
        let Some(file) = file?.message(SET_FILE)? else { continue };
        let mut package = "";
        let mut services = Vec::new();
        for field in Fields(file) {
            let field = field?;
            if let Some(text) = field.message(FILE_PACKAGE)? {
                package = utf8(text)?;
            } else {
                services.extend(field.message(FILE_SERVICE)?);
            }
        }
        // A service without a package has its bare name.
        let wanted = if package.is_empty() {
            Some(service)
        } else {
            service.strip_prefix(package).and_then(|rest| rest.strip_prefix('.'))
        };
        for found in services {
            let mut methods = Vec::new();
            let mut is_wanted = false;
            for field in Fields(found) {
                let field = field?;
                if let Some(text) = field.message(SERVICE_NAME)? {
                    is_wanted = Some(utf8(text)?) == wanted;
                } else if let Some(method) = field.message(SERVICE_METHOD)? {
                    for field in Fields(method) {
                        if let Some(text) = field?.message(METHOD_NAME)? {
                            methods.push(utf8(text)?.to_owned());
                        }
                    }
                }
            }
            if is_wanted {
                return Ok(Some(methods));
            }
        }
    }
    Ok(None)
}

fn utf8(bytes: &[u8]) -> Result<&str, String> {
    match std::str::from_utf8(bytes) {
        Ok(text) if text.len() <= 255 => Ok(text),
        Ok(_) => Err("a name is longer than 255 bytes".into()),
        Err(_) => Err("a name is not UTF-8".into()),
    }
}

struct Field<'a> {
    number: u64,
    /// The content of a length-delimited field; other fields are skipped.
    content: Option<&'a [u8]>,
}

impl<'a> Field<'a> {
    fn message(&self, number: u64) -> Result<Option<&'a [u8]>, String> {
        if self.number != number {
            return Ok(None);
        }
        self.content.map(Some).ok_or_else(|| format!("field {number} has the wrong wire type"))
    }
}

/// The fields of one message, until its end or the first error.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn varint(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let (byte, rest) = self.0.split_first()?;
            self.0 = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    fn take(&mut self, length: u64) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(usize::try_from(length).ok()?)?;
        self.0 = rest;
        Some(taken)
    }

    fn field(&mut self) -> Option<Field<'a>> {
        let tag = self.varint()?;
        let number = tag >> 3;
        let content = match tag & 7 {
            0 => self.varint().map(|_| None)?,
            1 => self.take(8).map(|_| None)?,
            2 => {
                let length = self.varint()?;
                Some(self.take(length)?)
            }
            5 => self.take(4).map(|_| None)?,
            // Groups (3 and 4) do not occur in descriptor.proto; 6 and 7 do not exist.
            _ => return None,
        };
        (number != 0).then_some(Field { number, content })
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<Field<'a>, String>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_none() {
            self.0 = &[];
        }
        Some(field.ok_or_else(|| "it is not a google.protobuf.FileDescriptorSet".to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use prost::Message;
    use prost_types::{FileDescriptorProto, FileDescriptorSet, MethodDescriptorProto, ServiceDescriptorProto};

    use super::{method_names, service_names};

    fn file(package: Option<&str>, services: &[&str]) -> FileDescriptorProto {
        let service = |name: &&str| ServiceDescriptorProto { name: Some((*name).into()), ..Default::default() };
        FileDescriptorProto {
            name: Some("x.proto".into()),
            package: package.map(Into::into),
            service: services.iter().map(service).collect(),
            syntax: Some("proto3".into()),
            ..Default::default()
        }
    }

    #[test]
    fn names_come_out_whole_and_sorted() {
        let set = FileDescriptorSet {
            file: vec![file(Some("b.v1"), &["Z", "A"]), file(None, &["Bare"]), file(Some("c"), &[])],
        };
        assert_eq!(service_names(&set.encode_to_vec(), 3), Ok(vec!["Bare".into(), "b.v1.A".into(), "b.v1.Z".into()]));
        assert_eq!(service_names(&set.encode_to_vec(), 2), Err("it has more than 2 services".into()));
        assert_eq!(service_names(b"", 0), Ok(vec![]));
    }

    #[test]
    fn methods_are_those_of_the_service_that_was_named() {
        let method = |name: &str| MethodDescriptorProto { name: Some(name.into()), ..Default::default() };
        let mut one = file(Some("b.v1"), &["A", "AB"]);
        one.service[0].method = vec![method("Get"), method("Put")];
        one.service[1].method = vec![method("Other")];
        let set = FileDescriptorSet { file: vec![file(None, &["A"]), one] }.encode_to_vec();
        assert_eq!(method_names(&set, "b.v1.A"), Ok(Some(vec!["Get".into(), "Put".into()])));
        assert_eq!(method_names(&set, "A"), Ok(Some(vec![])));
        assert_eq!(method_names(&set, "b.A"), Ok(None));
        assert!(method_names(&set[..set.len() - 1], "no.Such").is_err());
    }

    #[test]
    fn what_is_no_descriptor_set_is_refused() {
        let good = FileDescriptorSet { file: vec![file(Some("b.v1"), &["A"])] }.encode_to_vec();
        for cut in 1..good.len() {
            assert!(service_names(&good[..cut], 9).is_err(), "cut at {cut}");
        }
        for bad in [
            &b"\x08\x01"[..],
            b"{\"file\":[]}",
            b"\x0a\x04\x32\x02\x0a\x00",
            b"\x0a\x05\x32\x03\x0a\x01\xff",
            b"\x00\x00",
        ] {
            assert!(service_names(bad, 9).is_err(), "{bad:x?}");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_do_no_harm(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(names) = service_names(&bytes, 5) {
                prop_assert!(names.len() <= 5);
            }
        }
    }
}
