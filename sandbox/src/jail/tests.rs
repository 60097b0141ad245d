use super::*;

#[test]
fn ids_are_mapped_to_themselves() {
    let initial = "         0          0 4294967295\n";
    assert_eq!(identity(initial), "0 0 4294967295\n");
    let nested = "         0     100000      65536\n     70000     200000       1000\n";
    assert_eq!(identity(nested), "0 0 65536\n70000 70000 1000\n");
}
