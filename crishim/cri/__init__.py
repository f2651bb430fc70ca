"""The gRPC door: protobuf in, domain call, protobuf out."""
