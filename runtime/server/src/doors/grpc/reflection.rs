//! `grpc.reflection.v1.ServerReflection`, by which tools such as grpcurl find services and messages without their files.
//! Needs no key: it tells what this documentation tells.

use std::sync::Arc;

use axum::Router;
use tonic_reflection::server::Builder;

use crate::app::App;

/// `proto/inference.proto` and `proto/health.proto`, compiled. The test below writes them anew if T5GEMMA_WRITE is set.
const DESCRIPTORS: &[u8] = include_bytes!("../../../proto/descriptors.bin");

/// Adds the routes.
pub fn routes(router: Router<Arc<App>>) -> Router<Arc<App>> {
    let builder = || Builder::configure().register_encoded_file_descriptor_set(DESCRIPTORS);
    let (v1, v1alpha) = (builder().build_v1(), builder().build_v1alpha());
    router
        .route_service("/grpc.reflection.v1.ServerReflection/{method}", v1.expect("the descriptors are valid"))
        // Older tools know no other.
        .route_service(
            "/grpc.reflection.v1alpha.ServerReflection/{method}",
            v1alpha.expect("the descriptors are valid"),
        )
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use prost::Message;

    use super::*;

    #[test]
    fn descriptors_are_those_of_the_files() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("proto");
        let mut compiler = protox::Compiler::new([&folder]).expect("the folder is there");
        compiler.include_source_info(false).open_files(["inference.proto", "health.proto"]).expect("the files compile");
        let compiled = compiler.file_descriptor_set().encode_to_vec();
        if std::env::var_os("T5GEMMA_WRITE").is_some() {
            std::fs::write(folder.join("descriptors.bin"), &compiled).expect("written");
        }
        assert!(compiled == DESCRIPTORS, "the files have changed: run this test with T5GEMMA_WRITE=1 and build again");
    }
}
