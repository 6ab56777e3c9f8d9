// libtorch compiles Gloo in but ships none of its headers; only what c10d's own headers name is declared here.
#pragma once
