// What a CUDA torch's own build generates: with it, .cu files compile against the headers of a CPU torch.
#pragma once
