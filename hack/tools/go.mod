// What hack/test builds: tools that are written in Go, pinned here and in go.sum.
module crishim/hack/tools

go 1.26.2

require sigs.k8s.io/cri-tools v1.36.0
