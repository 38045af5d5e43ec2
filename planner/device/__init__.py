"""The machine: data sheets, processors, rules of CUDA."""
